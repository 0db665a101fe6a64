"""Draws the figures of docs/method.md from one real run on scikit-learn's digits: about a minute on one core.

    python docs/figures/draw.py             # writes docs/figures/*.svg
    python docs/figures/draw.py OUT smoke   # elsewhere, with a handful of steps, to try it

Figures of a report (`result.plot`) are taken as they are; drawn here is only what explains the method itself.
"""

import sys
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure

import hq_plugin as hq
from hq_plugin.integrations.timm import create_model
from hq_plugin.integrations.timm.demo_data import built_in
from hq_plugin.qat_layers import qat_layers
from hq_plugin.torch_ao import apply_policy

BUDGET = "2.6bit"
COLORS = {2: "#c4620e", 3: "#c78a1b", 4: "#6b97d3", 8: "#1c438c"}


def train() -> tuple[torch.nn.Module, torch.utils.data.TensorDataset]:
    """Returns a small timm ResNet that knows the digits, and the digits."""
    torch.manual_seed(0)
    x, y, _, _ = built_in("digits")
    model = create_model("resnet10t", in_chans=1, num_classes=10, channels=[8, 16, 32, 32], stem_width=8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(6):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return model.eval(), torch.utils.data.TensorDataset(x, y)


def generated(session: hq.Session, site: str, widths: tuple[int, ...]) -> Figure:
    """Draws a layer's float weights against those that its MetaQuantNet generates for some widths."""
    layer: Any = qat_layers(session.network)[site]
    original = dict(session.teacher.named_modules())[site].weight.detach().flatten()
    every = -(-len(original) // 500)  # enough to see, and the file stays small
    figure = Figure(figsize=(6.4, 2.6), layout="constrained")
    axes = figure.subplots(1, len(widths), sharey=True)
    for width, ax in zip(widths, axes, strict=True):
        policy = hq.HybridPolicy({found.name: hq.LayerBits(width, 8) for found in session.space.table})
        apply_policy(session.network, policy)
        with torch.no_grad():
            made = layer.weight.detach().flatten()
        ax.plot(original[::every], made[::every], ".", markersize=2, color=COLORS[width])
        ax.set_title(f"{width} bits", fontsize=9)
        ax.set_xlabel("float weight")
    axes[0].set_ylabel("generated weight")
    return figure


def main(out: Path, effort: str) -> None:
    """Runs the method once and writes the figures."""
    matplotlib.rcParams.update({"svg.hashsalt": "hq_plugin", "font.size": 9})
    model, data = train()
    smoke = {"meta_steps": 6, "search_evaluations": 12, "finetune_steps": 4}
    full = {"meta_steps": 100, "search_evaluations": 150, "finetune_steps": 150}
    steps = smoke if effort == "smoke" else full
    session = hq.meta_train(model, data, effort="fast", activation_bits=8, progress=False, **steps)
    site = max(session.space.table, key=lambda found: torch.Size(found.weight_shape).numel()).name
    figures = {"generated": generated(session, site, (2, 3, 4))}
    result: Any = session.quantize(BUDGET).hq
    figures |= {name: result.plot(name) for name in ("sensitivities", "front", "widths", "training")}
    out.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        # No date in the file: the same run writes the same bytes.
        figure.savefig(out / f"{name}.svg", metadata={"Date": None})
    best = ", ".join(f"{name} {baseline.kl:.4f}" for name, baseline in result.baselines.items())
    print(f"{BUDGET}: held-out KL before fine-tuning: {best}; fine-tuned {result.kl:.4f}; chosen: {result.chosen}")


if __name__ == "__main__":
    given = sys.argv[1:]
    main(Path(given[0]) if given else Path(__file__).parent, given[1] if len(given) > 1 else "full")
