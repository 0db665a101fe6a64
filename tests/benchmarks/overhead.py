"""What the method costs beside float training and a float forward, as ratios.

    python -m tests.benchmarks.overhead [--model resnet20]
    python -m tests.benchmarks.overhead --packed    # the forward of packed networks of several kinds and batches

Times are taken in turn in one process, and medians of the ratios are printed; memory is the peak of
two fresh processes above what they hold before the work starts.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import hq_plugin
from hq_plugin import Config, torch_ao
from hq_plugin.allocation import monotone
from hq_plugin.integrations.timm.demo_data import fashion_mnist
from hq_plugin.rates import Rates
from hq_plugin.sampling import PolicySampler
from hq_plugin.scoring import evaluating
from hq_plugin.training import Task, train
from tests.benchmarks.float_models import float_model
from tests.benchmarks.networks import new

STEPS, ROUNDS, BATCH = 10, 7, 128
CONFIG = Config(effort="fast", batch_size=BATCH, meta_steps=0, search_evaluations=100)


def seconds(function: Callable[[], object]) -> float:
    """Times one call."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def float_training(model: nn.Module, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Trains a float model on the batches, as anybody would."""
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for x, y in batches:
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def ratios(name: str) -> dict[str, tuple[float, float]]:
    """Returns each ratio's median, and its target."""
    x, y, _, _ = fashion_mnist()
    session = hq_plugin.meta_train(float_model(name), TensorDataset(x, y), config=CONFIG)
    batches = list(zip(x[: STEPS * BATCH].split(BATCH), y[: STEPS * BATCH].split(BATCH), strict=True))
    plain = new(name)
    sampler = PolicySampler(session.space, session.costs, monotone(session.sensitivities), 0)

    def meta_training() -> None:
        task = Task("bench", session.network, session.teacher, session.data, session.loss, STEPS, Rates(1e-6, 1e-6))
        task.before_step = lambda network, step: torch_ao.apply_policy(network, sampler(step))
        train(task)

    pairs = [(seconds(meta_training), seconds(lambda: float_training(plain, batches))) for _ in range(ROUNDS)]
    step = statistics.median(a / b for a, b in pairs[1:])

    scorer = session.scorer
    held = list(scorer.batches)[: scorer.samples // BATCH]

    def float_forward() -> None:
        with torch.no_grad():
            for batch in held:
                batch.run(session.teacher)

    with evaluating(session.network):
        # Every width has been generated once before, as in a search after its first candidates.
        for bits in session.space.weight_bits:
            session.scorer.score(
                session.network, session.space.policy(session.space.nearest_uniform(bits, 8)), samples=1
            )
        pairs = [
            (
                seconds(lambda n=n: scorer.score(session.network, sampler(n), samples=scorer.samples)),
                seconds(float_forward),
            )
            for n in range(4 * ROUNDS)
        ]
    score = statistics.median(a / b for a, b in pairs[4:])
    found = session.search("2.5bit").seconds
    overhead = found["search_overhead"] / (found["search_overhead"] + found["search_scoring"])
    packed = session.finetune(session.baselines("2.5bit")["dynamic_programming"], steps=0)
    packed(held[0].args[0])  # the first forward unpacks

    def packed_forward() -> None:
        with torch.no_grad():
            for batch in held:
                batch.run(packed)

    pairs = [(seconds(packed_forward), seconds(float_forward)) for _ in range(4 * ROUNDS)]
    forward = statistics.median(a / b for a, b in pairs[4:])
    memory = peak(name, "quantize") / peak(name, "float")
    return {
        "meta-training step / float training step": (step, 2.5),
        "scoring a candidate / float forward": (score, 1.5),
        "search's own share of the search": (overhead, 0.05),
        "packed forward / float forward, batch 128, 8-bit activations": (forward, 1.3),
        "peak memory of quantize / of float training": (memory, 4.0),
    }


def packed_networks() -> Iterator[tuple[str, nn.Module, torch.Tensor]]:
    """Yields networks of random weights, and inputs: what a packed forward adds hangs on what a layer takes."""
    torch.manual_seed(0)
    layers = [nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)]
    mlp = nn.Sequential(*layers).eval()
    for batch in (1, 128):
        yield f"784-256-256-10, batch {batch}", mlp, torch.randn(batch, 784)
    for name, size, batch in (
        ("mobilenetv3_small_050", 224, 1),
        ("mobilenetv2_035", 224, 8),
        ("resnet18", 64, 4),
        ("resnet18", 224, 1),
        ("vit_tiny_patch16_224", 224, 1),
    ):
        yield (
            f"{name}, {size} pixels, batch {batch}",
            timm.create_model(name).eval(),
            torch.randn(batch, 3, size, size),
        )


def packed_forwards() -> Iterator[tuple[str, float, float]]:
    """Yields each network's packed forward over the float one, as it is and with kernels chosen."""
    for name, model, x in packed_networks():
        config = Config(effort="smoke", meta_steps=0, finetune_steps=0, search_evaluations=2, progress=False)
        packed = hq_plugin.quantize(model, "4bit", [torch.randn(8, *x.shape[1:]) for _ in range(3)], config=config)
        plain = _forward_ratio(packed, model, x)
        hq_plugin.choose_kernels(packed, x)
        yield name, plain, _forward_ratio(packed, model, x)


@torch.no_grad()
def _forward_ratio(packed: nn.Module, model: nn.Module, x: torch.Tensor) -> float:
    for _ in range(3):
        packed(x), model(x)
    return statistics.median(
        seconds(lambda: [packed(x) for _ in range(3)]) / seconds(lambda: [model(x) for _ in range(3)])
        for _ in range(8 * ROUNDS)
    )


def peak(name: str, work: str) -> float:
    """Returns the peak memory of a fresh process above its start, in bytes."""
    out = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.overhead", "--model", name, "--work", work],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(out.stdout.split()[-1])


def work(name: str, what: str) -> None:
    """Does the work whose memory is measured, and prints its peak above the start."""
    x, y, _, _ = fashion_mnist()
    x, y = x[:4096], y[:4096]
    model = float_model(name)
    # Loading the data leaves a higher peak than what stays resident; Linux can forget it.
    Path("/proc/self/clear_refs").write_text("5")
    start = _peak_kib()
    if what == "float":
        float_training(model, list(zip(x.split(BATCH), y.split(BATCH), strict=True)))
    else:
        config = Config(effort="fast", batch_size=BATCH, meta_steps=16, finetune_steps=16, search_evaluations=20)
        hq_plugin.quantize(model, "2.5bit", TensorDataset(x, y), config=config)
    print((_peak_kib() - start) * 1024)


def _peak_kib() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


def main() -> None:
    """Prints the ratios as a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--work", choices=["float", "quantize"])
    parser.add_argument("--packed", action="store_true")
    options = parser.parse_args()
    if options.work:
        work(options.model, options.work)
        return
    if options.packed:
        print("| network | packed / float | with kernels chosen |\n|---|---|---|")
        for name, plain, chosen in packed_forwards():
            print(f"| {name} | {plain:.2f} | {chosen:.2f} |", flush=True)
        return
    print(f"| {options.model} | measured | target |\n|---|---|---|")
    for name, (value, target) in ratios(options.model).items():
        print(f"| {name} | {value:.3f} | ≤ {target:g} |", flush=True)


if __name__ == "__main__":
    main()
