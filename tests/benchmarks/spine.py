"""Hybrid against uniform and against dynamic programming, at the same number of training steps.

    python -m tests.benchmarks.spine [--models resnet20 mobilenetv3] [--seeds 0 1 2]

Resumable: a finished row is one line of docs/benchmarks/spine.jsonl and is not measured again.
`python -m tests.benchmarks.table` writes the tables of docs/benchmarks/spine.md from it.

Equal steps, in two senses. `one_call`: `hq_plugin.quantize` for one budget, whose meta-training and
fine-tuning take `STEPS` steps together; `low_rank` and `table` are the same with another block. `session`:
three budgets, `3 * STEPS` steps together; ours meta-trains once for the three (`META`) and fine-tunes each
(`FINETUNE`). Uniform and dynamic programming spend `STEPS` steps on quantization-aware training of their
policy, from the float weights. All share the training loop, the distillation loss, the quantizers, the
learning rates and the recalibration of BatchNorm.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from torch import nn
from torch.utils.data import TensorDataset

import hq_plugin
from hq_plugin import Budget, Config, HybridPolicy, Result
from hq_plugin.integrations.timm.demo_data import fashion_mnist
from hq_plugin.session import Session
from tests.benchmarks.float_models import float_model
from tests.benchmarks.matrix.measures import Classification

ROWS = Path("docs/benchmarks/spine.jsonl")
STEPS, META, FINETUNE = 300, 90, 270
assert META + 3 * FINETUNE == 3 * STEPS
ONE_CALL_META, ONE_CALL_FINETUNE = 30, 270
assert ONE_CALL_META + ONE_CALL_FINETUNE == STEPS
BITS = (2.2, 2.5, 3.0)
ABLATION_BITS = 2.5
#: BitOps of the third budget, as a multiple of the multiply-accumulates: 3-bit weights and 4-bit
#: activations are 12.
BITOPS_PER_MAC = 12.5
ACTIVATION_BITS = (4, 6, 8)


def budgets(session: Session) -> list[Budget]:
    """Returns the three budgets of a model."""
    macs = sum(site.macs for site in session.space.table)
    return [Budget(weight_bits=bits, bitops=BITOPS_PER_MAC * macs if bits == BITS[-1] else None) for bits in BITS]


def rows(name: str, seed: int, done: set[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """Measures what is not done yet for one model and seed."""
    model = float_model(name)
    train_x, train_y, test_x, test_y = fashion_mnist()
    data = TensorDataset(train_x, train_y)
    measure = Classification(model, test_x, test_y, batch=1000)
    base = Config(
        effort="fast",
        seed=seed,
        batch_size=128,
        activation_bits=ACTIVATION_BITS,
        meta_steps=META,
        finetune_steps=FINETUNE,
        search_evaluations=100,
    )

    def row(method: str, budget: Budget, packed: nn.Module, seconds: dict[str, float]) -> dict[str, Any]:
        result = cast(Result, packed.hq)
        return {
            "model": name,
            "seed": seed,
            "method": method,
            "budget": str(budget),
            **measure(packed),
            "float_accuracy": float_accuracy,
            "effective_bits": result.effective_bits,
            "bytes": result.size,
            "bitops": result.bitops,
            "seconds": {key: round(value, 1) for key, value in seconds.items()},
            "policy": result.policy.to_json(),
        }

    float_accuracy = measure(model)["accuracy"]
    # Without meta-training, the network is the float model rounded: its sensitivities are the rivals'.
    untrained = hq_plugin.meta_train(model, data, config=base, meta_steps=0, block="table")
    wanted = budgets(untrained)

    def one_call(method: str, block: str, wanted: list[Budget]) -> Iterator[dict[str, Any]]:
        for budget in wanted:
            if (name, seed, method, str(budget)) not in done:
                steps = {"meta_steps": ONE_CALL_META, "finetune_steps": ONE_CALL_FINETUNE}
                packed = hq_plugin.quantize(model, budget, data, config=base, block=block, **steps)
                yield row(method, budget, packed, cast(Result, packed.hq).seconds)

    yield from one_call("one_call", "dense", wanted)

    trained: dict[HybridPolicy, nn.Module] = {}
    for method in ("dynamic_programming", "uniform"):
        for budget in wanted:
            if (name, seed, method, str(budget)) in done:
                continue
            policy = untrained.baselines(budget)[method]
            began = time.perf_counter()
            if policy not in trained:  # one uniform policy may be the best for several budgets
                trained[policy] = untrained.finetune(policy, start="float", steps=STEPS)
            yield row(method, budget, trained[policy], {"finetune": time.perf_counter() - began})

    for block in ("low_rank", "table"):
        yield from one_call(block, block, [b for b in wanted if b.weight_bits == ABLATION_BITS])

    missing = [budget for budget in wanted if (name, seed, "session", str(budget)) not in done]
    if missing:
        session = hq_plugin.meta_train(model, data, config=base, block="dense")
        for budget in missing:
            packed = session.quantize(budget)
            yield row("session", budget, packed, cast(Result, packed.hq).seconds)


def finished() -> list[dict[str, Any]]:
    """Returns the rows measured so far."""
    if not ROWS.exists():
        return []
    rows = []
    for line in ROWS.read_text().splitlines():
        with contextlib.suppress(ValueError):  # a line that a stop cut short is measured again
            rows.append(json.loads(line))
    return rows


def main() -> None:
    """Measures every row that is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet20", "mobilenetv3"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args()
    ROWS.parent.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for name in options.models:
            done = {(r["model"], r["seed"], r["method"], r["budget"]) for r in finished()}
            for row in rows(name, seed, done):
                with ROWS.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(
                    {key: row[key] for key in ("model", "seed", "method", "budget", "kl", "accuracy")}, flush=True
                )


if __name__ == "__main__":
    main()
