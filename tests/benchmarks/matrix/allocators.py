"""Allocators: each gives every layer its width under a budget, from a network that was not trained for it.

They see the same search space, the same costs and, where they score policies, the same scores: the held-out
distance of the rounded float network with recalibrated BatchNorm (`hq_plugin.scoring`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hq_plugin import HybridPolicy
from hq_plugin.allocation import best_uniform, dynamic_programming, monotone
from hq_plugin.cost import Resource
from hq_plugin.scoring import evaluating
from hq_plugin.session import Session
from tests.benchmarks.matrix import evopress, haq
from tests.benchmarks.matrix.budget_moves import random_genome
from tests.benchmarks.matrix.hawq import hawq_losses
from tests.benchmarks.matrix.tasks import Task


@dataclass(frozen=True)
class Allocation:
    """A policy, and what it took to find it.

    Attributes:
        policy: The policy.
        scored: Policies that were scored for it.
        seconds: Wall time, by stage.
        notes: What else is worth keeping, such as the best score so far after each evaluation.
    """

    policy: HybridPolicy
    scored: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass
class Problem:
    """A task with a seed: the session that is not meta-trained, from which all rivals start.

    Attributes:
        task: The task.
        session: The float model rounded, and additive sensitivities of it.
        losses: HAWQ's additive losses and the seconds that they took, once measured.
    """

    task: Task
    session: Session
    losses: tuple[Any, float] | None = None

    @property
    def sensitivity_scores(self) -> int:
        """How many policies the additive sensitivities scored."""
        columns = 0 if self.session.config.sensitivities == "fisher" else self.session.space.top
        return int(np.sum(columns)) + 1

    def hawq(self) -> tuple[Any, float]:
        """HAWQ's losses, measured once, and the seconds that they took."""
        if self.losses is None:
            began = time.perf_counter()
            self.losses = hawq_losses(self.session), time.perf_counter() - began
        return self.losses

    def score(self, policy: HybridPolicy, share: float = 1.0) -> float:
        """Scores a policy on a share of a candidate's samples; call it inside `evaluating`."""
        samples = max(1, round(self.session.scorer.samples * share))
        return self.session.scorer.score(self.session.network, policy, samples=samples).distance


Allocator = Callable[[Problem, list[Resource]], Allocation]


def uniform(problem: Problem, resources: list[Resource]) -> Allocation:
    """The widest uniform policy that the budget has room for."""
    space = problem.session.space
    fitting = best_uniform(space, problem.session.costs, resources)
    if not fitting:
        raise ValueError("no uniform policy fits the budget")
    return Allocation(space.policy(fitting[-1]))


def random(problem: Problem, resources: list[Resource]) -> Allocation:
    """A random policy that uses the budget up."""
    rng = np.random.RandomState(problem.session.config.seed)
    return Allocation(problem.session.space.policy(random_genome(problem.session.space, resources, rng)))


def additive(problem: Problem, resources: list[Resource]) -> Allocation:
    """Dynamic programming on what each width of each layer costs alone."""
    session = problem.session
    began = time.perf_counter()
    genome = dynamic_programming(monotone(session.sensitivities), resources)
    seconds = {
        "sensitivities": session.seconds["sensitivities"],
        "allocation": time.perf_counter() - began,
    }
    return Allocation(session.space.policy(genome), problem.sensitivity_scores, seconds)


def hawq(problem: Problem, resources: list[Resource]) -> Allocation:
    """Dynamic programming on HAWQ-V2's traces times squared rounding errors."""
    losses, took = problem.hawq()
    began = time.perf_counter()
    genome = dynamic_programming(monotone(losses), resources)
    seconds = {"traces": took, "allocation": time.perf_counter() - began}
    return Allocation(problem.session.space.policy(genome), 0, seconds)


def haq_agent(problem: Problem, resources: list[Resource]) -> Allocation:
    """The best policy that HAQ's agent came across."""
    session, began = problem.session, time.perf_counter()
    with evaluating(session.network):
        found = haq.learn(session.space, resources, problem.score, problem.task.episodes, session.config.seed)
    seconds = {"allocation": time.perf_counter() - began}
    notes = {"held_out": found.score}
    return Allocation(session.space.policy(found.genome), found.scored, seconds, notes)


def evolution(problem: Problem, resources: list[Resource]) -> Allocation:
    """EvoPress, with as many evaluations as hq_plugin's sensitivities and search together."""
    session, began = problem.session, time.perf_counter()
    evaluations = problem.task.evaluations + problem.sensitivity_scores // 4
    with evaluating(session.network):
        start = best_uniform(session.space, session.costs, resources)[-1:]
        found = evopress.evolve(session.space, resources, problem.score, evaluations, session.config.seed, start)
    seconds = {"allocation": time.perf_counter() - began}
    notes = {"held_out": found.score, "evaluations": found.evaluations}
    return Allocation(session.space.policy(found.genome), found.scored, seconds, notes)


ALLOCATORS: dict[str, Allocator] = {
    "uniform_ptq": uniform,
    "uniform": uniform,
    "random": random,
    "dynamic_programming": additive,
    "dynamic_programming_blocks": additive,
    "hawq": hawq,
    "haq": haq_agent,
    "evopress": evolution,
}
#: Those whose policies are rounded and calibrated, and not trained.
UNTRAINED = ("uniform_ptq",)
#: Those whose training compares the outputs of blocks as well and softens scores, as hq_plugin's does. The others
#: distil end to end, as is usual.
MATCHING_BLOCKS = ("dynamic_programming_blocks",)
