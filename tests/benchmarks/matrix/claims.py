"""The claims of the paper that need more than a row of the matrix, each with a number.

`search`: how many evaluations and seconds HAQ's agent (and EvoPress) needs to reach the held-out distance that
hq_plugin's genetic search reaches, on the same scores. `front`: five budgets from one meta-training against five
separate runs of dynamic programming and training. `tau`: how well a policy's score before training tells its
distance after it (`rank_correlation.py`). Resumable, one row a line of docs/benchmarks/claims.jsonl.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import hq_plugin
from hq_plugin import Budget
from hq_plugin.allocation import best_uniform
from hq_plugin.scoring import evaluating
from hq_plugin.session import Session
from tests.benchmarks.matrix import evopress, haq, rank_correlation, rows
from tests.benchmarks.matrix.allocators import Problem
from tests.benchmarks.matrix.claims_page import KEY
from tests.benchmarks.matrix.methods import trained_from_float, untrained
from tests.benchmarks.matrix.rank_correlation import POLICIES, TAU_STEPS
from tests.benchmarks.matrix.rows import CLAIMS as PATH
from tests.benchmarks.matrix.rows import Row
from tests.benchmarks.matrix.run import Plan, tasks_of
from tests.benchmarks.matrix.tasks import Task
from tests.benchmarks.packaged import Missing

#: Budgets of `search` and of the policies of `tau` within one budget, where none is given.
ONE_BUDGET = "2.5bit"
#: The agent tries this many times as many policies as the genetic search before it is given up.
PATIENCE = 10
#: One session for five budgets: meta-training, and fine-tuning of each, as shares of a separate run's steps, and
#: the policies that each search scores. Together they are to take half of the seconds of five runs.
FRONT_META, FRONT_FINETUNE, FRONT_EVALUATIONS = 0.1, 0.3, 30
#: Separate runs: trained as the session is, or end to end on the distance itself, as the rivals of the matrix are.
SEPARATE = ("separate", "separate_plain")


@dataclass
class Context:
    """One model and seed, whose sessions several claims share.

    Attributes:
        task: The task.
        seed: The seed.
        steps: Training steps of a separate run.
        known: Keys that are measured.
    """

    task: Task
    seed: int
    steps: int
    known: set[tuple[Any, ...]]
    _rounded: Problem | None = None
    _trained: Session | None = None
    _trained_seconds: float = 0.0

    @property
    def rounded(self) -> Problem:
        """The session that is not meta-trained."""
        self._rounded = self._rounded or untrained(self.task, self.seed)
        return self._rounded

    def trained(self) -> tuple[Session, float]:
        """The session that is meta-trained for all budgets, and the seconds that this took."""
        if self._trained is None:
            began = time.perf_counter()
            self._trained = hq_plugin.meta_train(
                self.task.model,
                self.task.data,
                config=replace(self.task.config, seed=self.seed),
                block="auto",
                meta_steps=round(FRONT_META * self.steps),
                finetune_steps=round(FRONT_FINETUNE * self.steps),
                search_evaluations=FRONT_EVALUATIONS,
                finetune_from="float",  # which are closer here: to try both would cost 2 s a budget
            )
            self._trained_seconds = time.perf_counter() - began
        return self._trained, self._trained_seconds

    def head(self, claim: str, **names: Any) -> Row:
        """Returns what a row is known by."""
        return {"claim": claim, "model": self.task.name, "seed": self.seed, "steps": self.steps, **names}

    def missing(self, head: Row) -> bool:
        """Whether a row is not measured yet."""
        return rows.key(head, KEY) not in self.known


def search(context: Context, budgets: Sequence[str]) -> Iterator[tuple[Row, Callable[[], Row]]]:
    """The genetic search, HAQ's agent and EvoPress on the scores of the rounded float network."""
    for budget in budgets:
        yield context.head("search", budget=budget), lambda b=budget: _searches(context, b)  # type: ignore[misc]


def _searches(context: Context, budget: str) -> Row:
    problem, task = context.rounded, context.task
    session = problem.session
    session.config = replace(session.config, search_evaluations=task.evaluations)
    lasting, session.second_order = session.second_order, None  # all minimise the scores, and nothing beside them
    began = time.perf_counter()
    found = session.search(budget)
    session.second_order = lasting
    ours: Row = {
        "seconds": session.seconds["sensitivities"] + time.perf_counter() - began,
        "evaluations": problem.sensitivity_scores + len(found.history),
        "curve": _best_so_far([entry["score"] for entry in found.history], problem.sensitivity_scores),
    }
    goal = ours["curve"][-1][1]
    resources = session.costs.resources(Budget.parse(budget))
    with evaluating(session.network):
        learned = haq.learn(
            session.space, resources, problem.score, PATIENCE * task.evaluations, context.seed, enough=goal
        )
        began = time.perf_counter()
        evolved = evopress.evolve(
            session.space,
            resources,
            problem.score,
            ours["evaluations"],
            context.seed,
            best_uniform(session.space, session.costs, resources)[-1:],
        )
    took = time.perf_counter() - began
    reached = next((number for number, best in ours["curve"] if best <= learned.score), None)
    return {
        "goal": goal,
        "ours": ours,
        "haq": {
            "reached": learned.score <= goal,
            "episodes": len(learned.curve),
            "evaluations": learned.scored,
            "seconds": learned.curve[-1][1],
            "best": learned.score,
            # Our evaluations, sensitivities included, until the best that the agent found.
            "ours_to_its_best": reached,
            "curve": _thinned(learned.curve),
        },
        "evopress": {
            "reached": evolved.score <= goal,
            "evaluations": evolved.evaluations,
            "seconds": took,
            "best": evolved.score,
            "curve": evolved.curve,
        },
    }


def _best_so_far(scores: Sequence[float], before: int) -> list[list[float]]:
    """Returns `[evaluations, best score so far]` wherever it falls, and at the end."""
    best = np.minimum.accumulate(scores)
    falls = [i for i in range(len(best)) if i in (0, len(best) - 1) or best[i] < best[i - 1]]
    return [[before + i + 1, float(best[i])] for i in falls]


def _thinned(curve: list[list[float]]) -> list[list[float]]:
    return [point for i, point in enumerate(curve) if i in (0, len(curve) - 1) or point[-1] < curve[i - 1][-1]]


def front(context: Context, budgets: Sequence[str]) -> Iterator[tuple[Row, Callable[[], Row]]]:
    """All budgets from one meta-training, and each from a run of its own."""
    for side in SEPARATE:
        for budget in budgets:
            yield (
                context.head("front", side=side, budget=budget),
                lambda b=budget, s=side: _separate(context, b, s),  # type: ignore[misc]
            )
    yield context.head("front", side="session"), lambda: _session(context, budgets)


def _separate(context: Context, budget: str, side: str) -> Row:
    """Dynamic programming and training from float; a run of its own measures its own sensitivities."""
    session = context.rounded.session
    began = time.perf_counter()
    policy = session.baselines(budget)["dynamic_programming"]
    packed = trained_from_float(session, policy, context.steps, blocks=side == "separate")
    seconds = session.seconds["sensitivities"] + time.perf_counter() - began
    return {"seconds": round(seconds, 1), **context.task.measure(packed)}


def _session(context: Context, budgets: Sequence[str]) -> Row:
    session, seconds = context.trained()
    points, total = [], seconds
    for budget in budgets:
        began = time.perf_counter()
        packed = session.quantize(budget)
        took = time.perf_counter() - began
        total += took
        points.append({"budget": budget, "seconds": round(took, 1), **context.task.measure(packed)})
    shares = {"meta": FRONT_META, "finetune": FRONT_FINETUNE, "evaluations": FRONT_EVALUATIONS}
    return {"meta_seconds": round(seconds, 1), "seconds": round(total, 1), "points": points, "shares": shares}


def tau(context: Context, budget: str, finetune: int, policies: int) -> Iterator[tuple[Row, Callable[[], Row]]]:
    """Policies drawn across budgets and within one, their scores, and their distance after fine-tuning."""
    for pool in rank_correlation.POOLS:
        for number in range(policies):
            names: Row = {"pool": pool, "number": number, "finetune": finetune}
            if pool == "within":
                names["budget"] = budget
            yield (
                context.head("tau", **names),
                lambda p=pool, n=number: rank_correlation.measure(  # type: ignore[misc]
                    context.rounded, context.trained()[0], p, n, budget, finetune
                ),
            )


CLAIMS = ("search", "front", "tau")


def run(
    plan: Plan,
    wanted: Sequence[str],
    finetune: int = TAU_STEPS,
    policies: int = POLICIES,
    path: Path = PATH,
) -> Iterator[Row]:
    """Measures what is missing of the claims, and appends a row for each.

    Args:
        plan: Models, budgets, seeds and steps; methods are not looked at.
        wanted: Of `CLAIMS`.
        finetune: Steps of fine-tuning of a policy of `tau`.
        policies: Policies of each pool of `tau`.
        path: The file of rows.
    """
    for made in tasks_of(plan):
        for seed in plan.seeds_of(made.name):
            known = rows.done(rows.read(path), plan.retry, KEY)
            context = Context(made, seed, plan.chosen_steps or made.steps, known)
            one = (plan.budgets or (ONE_BUDGET if ONE_BUDGET in made.budgets else made.budgets[0],))[0]
            work: list[tuple[Row, Callable[[], Row]]] = []
            if "search" in wanted:
                work += search(context, plan.budgets or (one,))
            if "front" in wanted:
                # A limit of BitOps has inputs searched as well, which is another session's search space.
                work += front(context, plan.budgets or [b for b in made.budgets if Budget.parse(b).bitops is None])
            if "tau" in wanted:
                work += tau(context, one, finetune, policies)
            for head, measure in work:
                if not context.missing(head):
                    continue
                began = time.perf_counter()
                try:
                    found = measure()
                except Missing:
                    raise
                except Exception as error:  # what it dies of is a finding
                    found = {"error": f"{type(error).__name__}: {error}"}
                row = {**head, **found, "wall_seconds": round(time.perf_counter() - began, 1)}
                rows.append(path, row)
                yield row


def told(row: Row) -> str:
    """Returns a line about a row."""
    named = ", ".join(str(row[name]) for name in KEY if name in row)
    return f"{named}: {row.get('error', 'measured')}, {row['wall_seconds']:.0f} s"
