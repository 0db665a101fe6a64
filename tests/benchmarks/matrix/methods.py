"""Methods: an allocator and training for the same number of steps, or hq_plugin in one call.

All share training loop, quantizers, learning rates and recalibration of BatchNorm. Rivals minimise the distance
that is measured, from weights rounded to the nearest; hq_plugin and `dynamic_programming_blocks` soften scores,
compare outputs of blocks as well and start from weights rounded to second order. Rivals train their policy from the
float weights for `steps` steps (`Session.finetune(policy, start="float")`, on a session that is not meta-trained);
hq_plugin spends the same number on meta-training and fine-tuning together.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from torch import nn

import hq_plugin
from hq_plugin import Budget, HybridPolicy, Result
from hq_plugin.memory import peak_memory
from hq_plugin.session import BITOPS_ACTIVATION_BITS, Session
from tests.benchmarks.matrix.allocators import ALLOCATORS, MATCHING_BLOCKS, UNTRAINED, Allocation, Problem
from tests.benchmarks.matrix.rows import Row
from tests.benchmarks.matrix.tasks import Task

#: hq_plugin by the blocks of its MetaQuantNet; `auto` is dense for small layers and low-rank for large ones.
BLOCKS = {"hq_dense": "dense", "hq_auto": "auto", "hq_low_rank": "low_rank", "hq_table": "table"}
METHODS = (*ALLOCATORS, *BLOCKS)
#: What a row says of the machine's load that its seconds were measured under.
LOAD = Path("/proc/loadavg")


def methods_of(task: Task) -> list[str]:
    """Returns the methods that a task is measured with: of `hq_dense` and `hq_auto` its main one."""
    return [name for name in METHODS if name not in ("hq_dense", "hq_auto") or name == task.main]


def untrained(task: Task, seed: int, inputs: bool = False) -> Problem:
    """Returns the session from which rivals start: the float model rounded, and its additive sensitivities.

    Args:
        task: The task.
        seed: The seed.
        inputs: Whether widths of inputs are searched as well, as hq_plugin does where BitOps are limited.
    """
    config = replace(task.config, seed=seed, **task.others)
    if inputs:
        config = replace(config, activation_bits=BITOPS_ACTIVATION_BITS)
    return Problem(task, hq_plugin.meta_train(task.model, task.data, config=config, meta_steps=0, block="table"))


def trained_from_float(session: Session, policy: HybridPolicy, steps: int, *, blocks: bool) -> nn.Module:
    """Trains a policy from the float weights.

    Args:
        session: A session, whose options stay as they are.
        policy: The policy.
        steps: Training steps.
        blocks: Whether outputs of blocks are compared, scores softened and weights rounded to second order, as
            hq_plugin trains. Rivals train end to end, on the very distance that is measured.
    """
    ours = session.config
    changed = {"rounding": "second_order"} if blocks else {"block_loss": 0.0, "temperature": 1.0}
    session.config = replace(ours, **changed)
    try:
        return session.finetune(policy, start="float", steps=steps)
    finally:
        session.config = ours


class Runner:
    """Runs methods on one task with one seed; what several methods need is made once, when the first needs it.

    Args:
        task: The task.
        seed: The seed.
        steps: Training steps in place of the task's.
    """

    def __init__(self, task: Task, seed: int, steps: int | None = None) -> None:
        self.task, self.seed = task, seed
        self.steps = task.steps if steps is None else steps
        self.meta = round(task.meta * self.steps / task.steps) if task.steps else 0
        self._problems: dict[bool, Problem] = {}
        self._trained: dict[tuple[HybridPolicy, int, bool], tuple[Row, float]] = {}

    @cached_property
    def float_accuracy(self) -> float | None:
        """The float model's own, where the test data has labels."""
        return self.task.measure(self.task.model).get("accuracy")

    def problem(self, budget: str) -> Problem:
        """Returns the session that is not meta-trained and has the search space of a budget."""
        inputs = Budget.parse(budget).bitops is not None
        if inputs not in self._problems:
            self._problems[inputs] = untrained(self.task, self.seed, inputs)
        return self._problems[inputs]

    def row(self, method: str, budget: str) -> Row:
        """Measures a row; a failure is a row with its reason."""
        head = {
            "model": self.task.name,
            "seed": self.seed,
            "method": method,
            "budget": budget,
            "steps": self.steps,
        }
        began, worked = time.perf_counter(), time.process_time()
        reset_peak_memory()
        run: Callable[[str, str], Row] = self._one_call if method in BLOCKS else self._rival
        try:
            found = run(method, budget)
        except Exception as error:  # whatever a method dies of is a finding
            found = {"error": f"{type(error).__name__}: {error}"}
        with suppress(OSError):
            found["load"] = float(LOAD.read_text().split()[0])
        took = {"wall_seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - worked}
        return {**head, **found, **{name: round(value, 1) for name, value in took.items()}}

    def _one_call(self, method: str, budget: str) -> Row:
        task = self.task
        packed = hq_plugin.quantize(
            task.model,
            budget,
            task.data,
            config=replace(task.config, seed=self.seed),
            block=BLOCKS[method],
            meta_steps=self.meta,
            finetune_steps=self.steps - self.meta,
            search_evaluations=task.evaluations,
        )
        result = cast(Result, packed.hq)
        seconds = {name: took for name, took in result.seconds.items() if not name.startswith("search_")}
        scored = len(result.history["search"]) + self._sensitivity_scores(result)
        return self._measured(packed) | _finish(scored, seconds, self.steps, {"chosen": result.chosen})

    @staticmethod
    def _sensitivity_scores(result: Result) -> int:
        if result.config["sensitivities"] == "fisher":
            return 1
        return 1 + sum(len(s.weight_bits) + len(s.activation_bits) - 2 for s in result.sensitivities)

    def _rival(self, method: str, budget: str) -> Row:
        problem = self.problem(budget)
        session = problem.session
        resources = session.costs.resources(Budget.parse(budget))
        found: Allocation = ALLOCATORS[method](problem, resources)
        steps, blocks = 0 if method in UNTRAINED else self.steps, method in MATCHING_BLOCKS
        key = found.policy, steps, blocks
        # One policy may be the choice for several budgets or methods: it is trained once.
        if key not in self._trained:
            began = time.perf_counter()
            packed = trained_from_float(session, found.policy, steps, blocks=blocks)
            took = time.perf_counter() - began
            self._trained[key] = self._measured(packed), took
        measured, took = self._trained[key]
        stage = {"finetune" if steps else "calibration": took}
        return measured | _finish(found.scored, found.seconds | stage, steps, found.notes)

    def _measured(self, packed: nn.Module) -> Row:
        """What a finished model is: how close, how large, and its policy."""
        result = cast(Result, packed.hq)
        return {
            **self.task.measure(packed),
            "float_accuracy": self.float_accuracy,
            "effective_bits": result.effective_bits,
            "bytes": result.size,
            "bitops": result.bitops,
            "held_out_distance": result.kl,
            "policy": result.policy.to_json(),
        }


def _finish(scored: int, seconds: dict[str, float], trained: int, notes: dict[str, Any]) -> Row:
    return {
        "scored": scored,
        "seconds": {name: round(took, 2) for name, took in seconds.items()},
        "total_seconds": round(sum(seconds.values()), 1),
        "trained_steps": trained,
        "peak_memory": peak_memory(),
        "notes": notes,
    }


def reset_peak_memory() -> None:
    """Lets the system count the peak anew, where it can (Linux): rows share a process."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
