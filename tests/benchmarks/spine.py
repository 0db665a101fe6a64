"""The main benchmark: meta learning against its rivals at the same number of training steps.

For each network and seed, and each of three budgets:

- `searched`: meta-training (once for all budgets), search, fine-tuning; blocks chosen automatically,
  and the ablations `dense`, `low_rank` and `table`, where every block is of one kind;
- `uniform`: the best uniform policy inside the budget, all steps spent on quantization-aware training
  with learned steps from the float weights (LSQ, arXiv:1902.08153);
- `dynamic_programming`: the exact solution for additive sensitivities of the float model, then the
  same training.

All distil the same float model with the same optimizer and learning rates. Every figure is of the
packed model, on 10,000 test images that no method sees. Run as `python -m tests.benchmarks.spine`; rows
that `docs/benchmarks/spine.jsonl` holds are not measured again.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hq_plugin as hq
from hq_plugin.session import Found
from tests.benchmarks.cache import cache_directory
from tests.benchmarks.data import BATCH, test_set, training_loader
from tests.benchmarks.metrics import logits, quality
from tests.benchmarks.networks import NETWORKS
from tests.benchmarks.records import Records, Row
from tests.benchmarks.train_float import float_model

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "benchmarks" / "spine.jsonl"
KEY = ("network", "seed", "budget", "method", "meta_steps", "finetune_steps")
SEEDS = (0, 1, 2)
KINDS = {"searched": "auto", "dense": "dense", "low_rank": "low_rank", "table": "table"}
BASELINES = ("uniform", "dynamic_programming")
#: Activations have this width everywhere.
ACTIVATION_BITS = 4
#: Effective bits a weight of each budget, and the limit on BitOps as the mean weight width it allows
#: where each weight counts as often as it is used (None: no limit).
BUDGETS: dict[str, tuple[float, float | None]] = {
    "2.2bit": (2.2, None),
    "2.5bit": (2.5, None),
    "3bit+BitOps": (3.0, 2.6),
}


@dataclass(frozen=True)
class Effort:
    """Steps of meta-training and fine-tuning, whose sum each baseline trains; policies the search scores."""

    meta: int
    finetune: int
    evaluations: int


@dataclass
class Bench:
    """One network at one seed: its sessions and measurements.

    Attributes:
        network: Its name.
        seed: Seeds everything but the float model.
        effort: How much is trained and searched.
        records: Where rows are found and put.
    """

    network: str
    seed: int
    effort: Effort
    records: Records

    @cached_property
    def model(self) -> nn.Module:
        return float_model(self.network)

    @cached_property
    def float_scores(self) -> Tensor:
        return logits(self.model, test_set()[0])

    def missing(self, methods: list[str]) -> Iterator[tuple[str, str]]:
        """Yields the pairs of method and budget without a row."""
        for method in methods:
            for budget in BUDGETS:
                if self.records.find(self._key(method, budget)) is None:
                    yield method, budget

    def run(self, methods: list[str]) -> None:
        """Measures what is missing."""
        for method in methods:
            budgets = [budget for _, budget in self.missing([method])]
            if budgets and method in BASELINES:
                self._baseline(method, budgets)
            elif budgets:
                self._searched(method, budgets)

    def _searched(self, method: str, budgets: list[str]) -> None:
        folder = cache_directory() / "sessions" / f"{self.network}-{method}-{self.seed}-{self.effort.meta}"
        options = self._options(finetune_steps=self.effort.finetune)
        if folder.exists():
            session = hq.load_session(folder, self.model, training_loader())
        else:
            session = hq.meta_train(
                self.model, training_loader(), block=KINDS[method], meta_steps=self.effort.meta, **options
            )
            session.save(folder)
        for name in budgets:
            budget = self._budget(session, name)
            found = session.search(budget)
            self._add(method, name, budget, session.finetune(found, budget=budget), found=found)
        shutil.rmtree(folder)

    def _baseline(self, method: str, budgets: list[str]) -> None:
        steps = self.effort.meta + self.effort.finetune
        options = self._options(finetune_steps=steps)
        session = hq.meta_train(self.model, training_loader(), block="table", meta_steps=0, **options)
        for name in budgets:
            budget = self._budget(session, name)
            began = time.perf_counter()
            policy = session.baselines(budget)[method]
            choosing = time.perf_counter() - began
            twin = self._same_policy(method, policy)
            if twin is not None:
                limits = {"budget": name, "limits": asdict(budget), "same_policy_as": twin["budget"]}
                self.records.add({**twin, **limits})
                continue
            packed = session.finetune(policy, budget=budget, start="float")
            self._add(method, name, budget, packed, seconds={"choosing": choosing})

    def _same_policy(self, method: str, policy: hq.HybridPolicy) -> Row | None:
        """Returns the row of another budget for which this method trained the same policy."""
        rows = (self.records.find(self._key(method, budget)) for budget in BUDGETS)
        return next((row for row in rows if row is not None and row["policy"] == policy.to_json()), None)

    def _add(
        self,
        method: str,
        name: str,
        budget: hq.Budget,
        packed: nn.Module,
        *,
        found: Found | None = None,
        seconds: dict[str, float] | None = None,
    ) -> None:
        images, labels = test_set()
        result: hq.Result = packed.hq  # type: ignore[assignment]
        measured = quality(logits(packed, images), self.float_scores, labels)
        stages = {**result.seconds, **(seconds or {})}
        row = {
            **self._key(method, name),
            "limits": asdict(budget),
            **asdict(measured),
            "float_accuracy": float((self.float_scores.argmax(1) == labels).double().mean()),
            "effective_bits": result.effective_bits,
            "bytes": result.size,
            "float_bytes": result.float_size,
            "bitops": result.bitops,
            "seconds": {stage: round(value, 2) for stage, value in stages.items()},
            "evaluations": self.effort.evaluations if found else 0,
            "chosen": result.chosen,
            "policy": result.policy.to_json(),
            "versions": result.versions,
            "threads": torch.get_num_threads(),
        }
        self.records.add(row)
        print(
            f"{self.network} seed {self.seed} {name} {method}: KL {measured.kl:.4f}, agreement "
            f"{measured.agreement:.4f}, accuracy {measured.accuracy:.4f}, {result.effective_bits:.3f} bits, "
            f"{sum(stages.values()):.0f} s",
            flush=True,
        )

    def _key(self, method: str, budget: str) -> Row:
        steps = {"meta_steps": self.effort.meta, "finetune_steps": self.effort.finetune}
        return {"network": self.network, "seed": self.seed, "budget": budget, "method": method, **steps}

    def _options(self, finetune_steps: int) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "batch_size": BATCH,
            "activation_bits": ACTIVATION_BITS,
            "finetune_steps": finetune_steps,
            "search_evaluations": self.effort.evaluations,
            "progress": False,
        }

    @staticmethod
    def _budget(session: hq.Session, name: str) -> hq.Budget:
        weight_bits, mean_width = BUDGETS[name]
        macs = sum(site.macs for site in session.space.table)
        bitops = None if mean_width is None else mean_width * ACTIVATION_BITS * macs
        return hq.Budget(weight_bits=weight_bits, bitops=bitops)


def main() -> None:
    """Measures every row that is missing, seed by seed, and writes the table."""
    from tests.benchmarks.table import write_table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument(
        "--methods", nargs="+", default=[*BASELINES, *KINDS], choices=[*BASELINES, *KINDS], metavar="METHOD"
    )
    parser.add_argument("--meta-steps", type=int, default=1500)
    parser.add_argument("--finetune-steps", type=int, default=1000)
    parser.add_argument("--evaluations", type=int, default=400)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    records = Records(options.results, KEY)
    effort = Effort(options.meta_steps, options.finetune_steps, options.evaluations)
    for seed in options.seeds:
        for network in options.networks:
            Bench(network, seed, effort, records).run(options.methods)
            write_table(records)


if __name__ == "__main__":
    main()
