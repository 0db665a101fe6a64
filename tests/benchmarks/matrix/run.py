"""Runs the matrix: models, budgets, methods and seeds, each once; a stop loses at most the row it was in.

The whole matrix takes days on two cores; `fast` is one small network at one budget in at most 20 minutes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.matrix import rows
from tests.benchmarks.matrix.methods import Runner, methods_of
from tests.benchmarks.matrix.rows import Row
from tests.benchmarks.matrix.tasks import BUILDERS, Task, task
from tests.benchmarks.packaged import Missing

SEEDS = (0, 1, 2)
#: Seeds of models whose rows take an hour.
FEW_SEEDS = {"smollm2": (0,)}
#: What `--fast` measures.
FAST_MODELS, FAST_BUDGETS, FAST_SEEDS, FAST_STEPS = ("resnet20",), ("2.5bit",), (0,), 100


@dataclass(frozen=True)
class Plan:
    """What is to be measured; None means all.

    Attributes:
        models: Names of tasks.
        methods: Names of methods.
        budgets: Budgets as text.
        seeds: Seeds.
        steps: Training steps in place of each task's.
        fast: Measure little.
        retry: Measure failed rows again.
        data: Folder of CIFAR-10 or ImageNet.
    """

    models: Sequence[str] | None = None
    methods: Sequence[str] | None = None
    budgets: Sequence[str] | None = None
    seeds: Sequence[int] | None = None
    steps: int | None = None
    fast: bool = False
    retry: bool = False
    data: Path | None = None

    @property
    def chosen_models(self) -> Sequence[str]:
        """Models in the order in which they are measured, the small ones first."""
        return self.models or (FAST_MODELS if self.fast else tuple(BUILDERS))

    @property
    def chosen_steps(self) -> int | None:
        """Training steps, or None for the task's."""
        return self.steps if self.steps is not None or not self.fast else FAST_STEPS

    def seeds_of(self, name: str) -> Sequence[int]:
        """Returns the seeds of a model."""
        if self.seeds:
            return self.seeds
        return FAST_SEEDS if self.fast else FEW_SEEDS.get(name, SEEDS)

    def budgets_of(self, made: Task) -> Sequence[str]:
        """Returns the budgets of a model."""
        return self.budgets or (FAST_BUDGETS if self.fast else made.budgets)


def tasks_of(plan: Plan, build: Callable[[str, Path | None], Task] = task) -> Iterator[Task]:
    """Builds the tasks in turn; says which cannot be had, and how they could."""
    for name in plan.chosen_models:
        try:
            yield build(name, plan.data)
        except Missing as error:
            print(f"{name} is passed over: {error}", flush=True)


def run(plan: Plan, path: Path = rows.MATRIX, build: Callable[[str, Path | None], Task] = task) -> Iterator[Row]:
    """Measures what is missing, and appends a row for each.

    Args:
        plan: What is wanted.
        path: The file of rows.
        build: Builds a task by its name.

    Yields:
        Each new row, once it is on disk.
    """
    for made in tasks_of(plan, build):
        for seed in plan.seeds_of(made.name):
            runner = Runner(made, seed, plan.chosen_steps)
            for budget in plan.budgets_of(made):
                for method in plan.methods or methods_of(made):
                    head = {"model": made.name, "seed": seed, "method": method, "budget": budget}
                    known = rows.done(rows.read(path), plan.retry)
                    if rows.key({**head, "steps": runner.steps}) in known:
                        continue
                    row = runner.row(method, budget) | {"date": time.strftime("%Y-%m-%d")}
                    rows.append(path, row)
                    yield row


def told(row: Row) -> str:
    """Returns a line about a row."""
    head = f"{row['model']}, seed {row['seed']}, {row['budget']}, {row['method']}"
    if "error" in row:
        return f"{head}: failed, {row['error']}"
    return f"{head}: {row['distance']:.4f} at {row['effective_bits']:.3f} bits, {row['wall_seconds']:.0f} s"
