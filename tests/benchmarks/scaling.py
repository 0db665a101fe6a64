"""What the method takes as models grow: per step, per candidate and in memory, measured on small language models.

    python -m tests.benchmarks.scaling [--page]

Each row is a fresh process: a Llama of random weights, quantized to 3.5 bits with a few steps. Times are ratios to
the float model's forward on the same tokens, taken in the same process; memory is the process's peak above what it
held before. `--page` writes docs/benchmarks/scaling.md, with what the slopes say of models that were not run.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hq_plugin
from hq_plugin import Config, torch_ao
from hq_plugin.allocation import monotone
from hq_plugin.rates import Rates
from hq_plugin.sampling import PolicySampler
from hq_plugin.scoring import evaluating
from hq_plugin.training import Task, train

ROWS, PAGE = Path("docs/benchmarks/scaling.jsonl"), Path("docs/benchmarks/scaling.md")
#: Width, layers and weight widths of the models that are measured.
CASES = [
    (256, 4, (2, 3, 4, 5, 6, 8)),
    (384, 6, (2, 3, 4, 5, 6, 8)),
    (512, 8, (2, 3, 4, 5, 6, 8)),
    (768, 8, (2, 3, 4, 5, 6, 8)),
    (384, 6, (3, 4)),
    (192, 24, (2, 3, 4, 5, 6, 8)),
]
VOCABULARY, BATCH, TOKENS, STEPS, ROUNDS = 4096, 4, 64, 3, 5


def model(width: int, layers: int) -> LlamaForCausalLM:
    """Returns a Llama of random weights, in the proportions of the real ones."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def status(field: str) -> int:
    """Returns a count of bytes that Linux keeps of this process."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024


def measure(width: int, layers: int, bits: tuple[int, ...]) -> dict[str, Any]:
    """Measures one model in this process."""
    net = model(width, layers)
    tokens = torch.randint(0, VOCABULARY, (40, TOKENS))
    data = [{"input_ids": part} for part in tokens.split(BATCH)]
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    config = Config(effort="fast", weight_bits=bits, meta_steps=0, search_evaluations=4, holdout=4, progress=False)
    began = time.perf_counter()
    session = hq_plugin.meta_train(net, data, config=config)
    prepared = time.perf_counter() - began
    batch = session.data.holdout[0]

    def forward() -> float:
        began = time.perf_counter()
        with torch.no_grad():
            batch.run(session.teacher)
        return time.perf_counter() - began

    sampler = PolicySampler(session.space, session.costs, monotone(session.sensitivities), 0)

    def step() -> float:
        task = Task("bench", session.network, session.teacher, session.data, session.loss, STEPS, Rates(1e-9, 1e-9))
        task.blocks, task.block_loss = session.blocks, 0.3
        task.before_step = lambda network, n: torch_ao.apply_policy(network, sampler(n))
        began = time.perf_counter()
        train(task)
        return (time.perf_counter() - began) / STEPS

    forward()
    steps = statistics.median(step() / forward() for _ in range(ROUNDS))
    with evaluating(session.network):
        score = []
        for n in range(ROUNDS):
            began = time.perf_counter()
            session.scorer.score(session.network, sampler(n), samples=BATCH)
            score.append((time.perf_counter() - began) / forward())
    session.quantize("3.5bit")
    weights = session.space.table.weights
    return {
        "width": width,
        "layers": layers,
        "bits": list(bits),
        "parameters": sum(p.numel() for p in net.parameters()),
        "weights": weights,
        "sites": len(session.space.table),
        "step_per_forward": round(steps, 2),
        "candidate_per_forward": round(statistics.median(score), 2),
        "preparation_per_forward": round(prepared / forward(), 1),
        "peak_bytes": status("VmHWM") - before,
    }


def finished() -> list[dict[str, Any]]:
    """Returns the rows measured so far."""
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []


#: Parameters of models that are asked about, and the bytes of a parameter in the format that they come in.
ASKED = {"1.5 B": 1.5e9, "8 B": 8e9, "70 B": 70e9}
#: Floating-point operations a second that one GPU is assumed to reach, and its memory in bytes.
GPU_FLOPS, GPU_BYTES, GPUS = 4e14, 80e9, 8
#: Tokens of a step, steps and candidates of effort "balanced" for language models (docs/huggingface.md).
STEP_TOKENS, TRAINING_STEPS, CANDIDATES, CANDIDATE_TOKENS = 16 * 2048, 340, 80, 8 * 2048


def page(rows: list[dict[str, Any]]) -> str:
    """Returns the page: what was measured, and what follows for larger models."""
    grown = [row for row in rows if len(row["bits"]) == 6]
    slope, base = np.polyfit([row["parameters"] for row in grown], [row["peak_bytes"] for row in grown], 1)
    step = statistics.median(row["step_per_forward"] for row in grown)
    candidate = statistics.median(row["candidate_per_forward"] for row in grown)
    lines = [
        "# How the cost grows",
        "",
        "Llamas of random weights, groups of 64, batches of 4 × 64 tokens, float32 on a CPU; each row is a process",
        "of its own. Times are ratios to the float model's forward on the same tokens, medians of 5. Memory is the",
        "peak of meta-training, search, fine-tuning and conversion above the process with the float model loaded.",
        "Reproduce: `python -m tests.benchmarks.scaling && python -m tests.benchmarks.scaling --page`.",
        "",
        "| width × layers | widths | parameters | sites | step / forward | candidate / forward "
        "| preparation / forward | peak, bytes a parameter |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['width']} × {row['layers']} | {len(row['bits'])} | {row['parameters'] / 1e6:.1f} M | "
            f"{row['sites']} | {row['step_per_forward']} | {row['candidate_per_forward']} | "
            f"{row['preparation_per_forward']:g} | {row['peak_bytes'] / row['parameters']:.0f} |"
        )
    lines += [
        "",
        f"Over the models with six widths memory grows by {slope:.1f} bytes a parameter (and {base / 1e6:.0f} MB "
        f"whatever the size); a step takes {step:.1f} and a candidate {candidate:.1f} float forwards.",
        "",
        "## What larger models would take",
        "",
        "Calculated, not run, from these constants: a forward takes two operations a parameter and token; "
        f"{TRAINING_STEPS} steps of {STEP_TOKENS:,} tokens and {CANDIDATES} candidates of {CANDIDATE_TOKENS:,} "
        f"(effort `balanced`, at a batch that fills {GPUS} GPUs), split over {GPUS} GPUs that reach "
        f"{GPU_FLOPS:.0e} operations a second each. Preparation (moments, groups) is not in it. "
        "Data-parallel, every GPU holds all of it; in pieces (FSDP2) each holds its share, and one block. "
        "What crosses between GPUs is not in the hours. The host holds the float model, the network and its "
        "generators whole, once a process: at least 8 bytes a parameter each.",
        "",
        f"| model | memory of each GPU | in pieces | {GPU_BYTES / 1e9:.0f} GB are enough | hours on {GPUS} GPUs |",
        "|---|---|---|---|---|",
    ]
    for name, parameters in ASKED.items():
        forwards = TRAINING_STEPS * STEP_TOKENS * step + CANDIDATES * CANDIDATE_TOKENS * candidate
        hours = forwards * 2 * parameters / (GPUS * GPU_FLOPS) / 3600
        memory = slope * parameters + base
        pieces = slope * parameters / GPUS + base
        fits = "yes" if memory < GPU_BYTES else "in pieces"
        if pieces >= GPU_BYTES:
            fits = f"in pieces over {math.ceil(slope * parameters / (GPU_BYTES - base))} GPUs"
        lines.append(f"| {name} | {memory / 1e9:.0f} GB | {pieces / 1e9:.0f} GB | {fits} | {hours:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures the rows that are missing, or writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--case", type=int, help="measure one case in this process, and print it")
    options = parser.parse_args()
    if options.page:
        PAGE.write_text(page(finished()))
        return
    if options.case is not None:
        print(json.dumps(measure(*CASES[options.case])))
        return
    known = {(row["width"], row["layers"], tuple(row["bits"])) for row in finished()}
    for number, case in enumerate(CASES):
        if case in known:
            continue
        command = [sys.executable, "-m", "tests.benchmarks.scaling", "--case", str(number)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        with ROWS.open("a") as file:
            file.write(done.stdout.splitlines()[-1] + "\n")
        print(done.stdout.splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
