"""What the method costs beside plain training and inference of the float model.

Ratios, measured interleaved in one process so that a busy machine slows both sides, medians; the peak
memories in fresh processes. Run as `python -m tests.benchmarks.overhead [resnet20 mobilenetv3 ...]`.
"""

from __future__ import annotations

import argparse
import copy
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import hq_plugin as hq
from hq_plugin.data import Batch, Data
from hq_plugin.meta_training import meta_train_network
from hq_plugin.sampling import PolicySampler
from hq_plugin.scoring import evaluating
from tests.benchmarks.data import BATCH, training_loader
from tests.benchmarks.networks import NETWORKS
from tests.benchmarks.train_float import float_model

#: Steps of the memory measurements: enough to have every buffer of every kind.
MEMORY_STEPS = 30
BUDGET = "2.5bit"


@dataclass(frozen=True)
class Ratio:
    """One line of the table: a time or memory of ours, that of the float model, and what is aimed at."""

    name: str
    ours: float
    reference: float
    unit: str
    target: float

    def __str__(self) -> str:
        ratio = self.ours / self.reference
        verdict = "yes" if ratio <= self.target else "no"
        return (
            f"| {self.name} | {self.ours:.1f} {self.unit} | {self.reference:.1f} {self.unit} | {ratio:.2f} | "
            f"{self.target:g} | {verdict} |"
        )


class FloatTraining:
    """Plain training of a float model with Adam, a step at a time."""

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model).requires_grad_(True).train()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)

    def step(self, batch: Batch) -> None:
        loss = F.cross_entropy(batch.run(self.model), batch.labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


class Interleaved:
    """Training batches that run a step of float training, timed, before each one is handed out.

    The time from handing one out to being asked for the next is the step of whoever trains on them.
    """

    def __init__(self, batches: Iterable[Batch], other: FloatTraining) -> None:
        self.batches, self.other = batches, other
        self.theirs: list[float] = []
        self.others: list[float] = []

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            self.others.append(seconds(lambda batch=batch: self.other.step(batch)))
            began = time.perf_counter()
            yield batch
            self.theirs.append(time.perf_counter() - began)


def seconds(run: Callable[[], Any]) -> float:
    """Returns the wall time of a call."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def options(**more: Any) -> dict[str, Any]:
    """Returns the options of every session here."""
    return {"batch_size": BATCH, "activation_bits": 4, "progress": False, **more}


def time_training(session: hq.Session, steps: int) -> Ratio:
    """Compares a step of meta-training with one of float training on the same batch."""
    batches = Interleaved(session.data.train, FloatTraining(session.teacher))
    data = Data(batches, session.data.holdout)
    meta_train_network(
        session.network, session.teacher, session.space, session.costs, data, session.loss, session.config
    )
    warm = steps // 5
    ours, reference = (1000 * statistics.median(times[warm:]) for times in (batches.theirs, batches.others))
    return Ratio("step of meta-training / step of float training", ours, reference, "ms", 2.5)


def time_scoring(session: hq.Session, rounds: int) -> Ratio:
    """Compares scoring a new policy with the float model's forward over the held-out samples scored."""
    scorer = session.scorer
    sampler = PolicySampler(session.space, session.costs, seed=1)
    ours, reference = [], []
    with evaluating(session.network), torch.no_grad():
        # As in a search, where sensitivities come first, each width of each layer has been seen before.
        for index in range(int(session.space.top.max()) + 1):
            genome = np.minimum(session.space.top, index)
            scorer.score(session.network, session.space.policy(genome), samples=BATCH)
        for step in range(rounds):
            policy = sampler(step)
            began = time.perf_counter()
            scorer.score(session.network, policy, samples=scorer.samples)
            middle = time.perf_counter()
            scorer.measure(session.teacher, samples=scorer.samples)
            ours.append(1000 * (middle - began))
            reference.append(1000 * (time.perf_counter() - middle))
    name = f"scoring a policy / float forward over the same {scorer.samples} samples"
    return Ratio(name, statistics.median(ours), statistics.median(reference), "ms", 1.5)


def time_search(session: hq.Session) -> Ratio:
    """Returns the share of a search, sensitivities and re-ranking included, that is not scoring."""
    scorer: Any = session.scorer
    plain, scoring = scorer.score, 0.0

    def timed(*args: Any, **kwargs: Any) -> Any:
        nonlocal scoring
        began = time.perf_counter()
        try:
            return plain(*args, **kwargs)
        finally:
            scoring += time.perf_counter() - began

    scorer.score = timed
    whole = seconds(lambda: session.search(BUDGET))
    del scorer.score
    return Ratio("search without scoring / whole search", whole - scoring, whole, "s", 0.05)


def compare_memory(network: str) -> Ratio:
    """Compares the growth of resident memory during a whole `quantize` with that of float training."""
    ours, reference = (
        float(
            subprocess.run(
                [sys.executable, "-m", "tests.benchmarks.overhead", network, "--memory-of", what],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        )
        for what in ("quantize", "training")
    )
    return Ratio("peak memory of quantize / of float training", ours, reference, "MB", 4)


def memory_of(network: str, what: str) -> float:
    """Returns by how many MB the peak of this process's memory grows, once model and data are there."""
    model, loader = float_model(network), training_loader()
    images, labels = next(iter(loader))
    with torch.no_grad():
        model(images[:2])  # loads what torch loads lazily
    before = _peak()
    if what == "training":
        training = FloatTraining(model)
        for images, labels in islice(loader, MEMORY_STEPS):
            training.step(Batch((images,), {}, labels, len(images)))
    else:
        steps = {"meta_steps": MEMORY_STEPS, "finetune_steps": MEMORY_STEPS, "search_evaluations": 30}
        hq.quantize(model, BUDGET, loader, **options(**steps))
    return _peak() - before


def _peak() -> float:
    """Returns the peak resident memory of this process in MB (Linux counts it in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def measure(network: str, steps: int, rounds: int, evaluations: int) -> list[Ratio]:
    """Returns the four ratios of one network."""
    model = float_model(network)
    loader = training_loader()
    session = hq.meta_train(model, loader, **options(meta_steps=0, search_evaluations=evaluations))
    session.config = session.config.with_options({"meta_steps": steps})
    return [
        time_training(session, steps),
        time_scoring(session, rounds),
        time_search(session),
        compare_memory(network),
    ]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--steps", type=int, default=60, help="steps of training timed")
    parser.add_argument("--rounds", type=int, default=30, help="policies scored")
    parser.add_argument("--evaluations", type=int, default=200, help="policies of the search")
    parser.add_argument("--memory-of", choices=("quantize", "training"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.memory_of:
        print(memory_of(chosen.networks[0], chosen.memory_of))
        return
    for network in chosen.networks:
        print(f"\n## {network}\n\n| what | ours | reference | ratio | target | met |\n|---|---|---|---|---|---|")
        for ratio in measure(network, chosen.steps, chosen.rounds, chosen.evaluations):
            print(ratio, flush=True)


if __name__ == "__main__":
    main()
