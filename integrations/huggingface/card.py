"""The model card that is written beside the weights."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from pathlib import Path
from typing import Any

from hq_plugin.policy import FLOAT_BITS, LayerBits

#: A name on the hub, alone or under that of its owner.
_HUB_NAME = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


#: Last line of a card, with what it is a digest of: the card as it was written.
_MARK = "<!-- hq_plugin {} -->"


def is_unedited(page: str) -> bool:
    """Whether a card is as `card` returned it, so that another may replace it."""
    text, _, mark = page.rstrip("\n").rpartition("\n")
    return mark == _MARK.format(_digest(text))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def card(class_name: str, origin: str, config: Any) -> str:
    """Returns a model card in Markdown.

    Args:
        class_name: Class of the model.
        origin: Name or path of the float model, or "".
        config: Its `HqConfig`.
    """
    summary: dict[str, Any] = config.summary
    widths = Counter(bits[0] for bits in config.policy.values())
    policy = config.hybrid_policy()
    groups = sorted({bits.group_size for bits in policy.values() if bits.group_size})
    activations = Counter(_activation(bits) for bits in policy.values())
    hub_name = origin if _HUB_NAME.fullmatch(origin) and not Path(origin).exists() else ""
    lines = ["---", "library_name: transformers", *([f"base_model: {hub_name}"] if hub_name else [])]
    lines += [
        "tags:",
        "- hq_plugin",
        "- quantized",
        "---",
        "",
        f"# {hub_name or class_name}, quantized by hq_plugin",
        "",
    ]
    lines += [
        "Hybrid low-bit weights: each layer has its own width. The method is that of Wang et al.,",
        "[arXiv:2004.11506](https://arxiv.org/abs/2004.11506).",
        "",
        "| | |",
        "|---|---|",
        f"| base model | {hub_name or class_name} |",
    ]
    if summary:
        share = summary["bytes"] / max(summary["float_bytes"], 1)
        lines += [
            f"| budget | {summary['budget']} |",
            f"| effective bits | {summary['effective_bits']:.3f} a weight, steps and zero points counted |",
            f"| size | {summary['bytes']:,} bytes, {share:.1%} of the float model |",
        ]
    lines += [
        f"| layers by weight width | {', '.join(f'{n} of {bits} bits' for bits, n in sorted(widths.items()))} |",
        f"| inputs of a group that share a step | {', '.join(map(str, groups)) or 'all of a channel'} |",
        "| layers by activation width | "
        + ", ".join(f"{n} {width}" for width, n in sorted(activations.items()))
        + " |",
        "",
    ]
    if summary:
        lines += ["## Fidelity", "", "Distance to the float model on held-out calibration data.", ""]
        lines += ["| | distance | agreement of the first choice |", "|---|---|---|"]
        agreement = "" if summary["agreement"] is None else f"{summary['agreement']:.4f}"
        lines += [f"| this model | {_distance(summary['kl'])} | {agreement} |"]
        lines += [
            f"| {name}, before fine-tuning | {_distance(kl)} | |"
            for name, kl in sorted(summary["baselines"].items())
        ]
        lines += [""]
    lines += [
        "## Loading",
        "",
        "```python",
        "import hq_plugin  # pip install hq-plugin; registers the format with transformers",
        f"from transformers import {class_name}",
        "",
        f'model = {class_name}.from_pretrained("path/to/this/folder")',
        "```",
        "",
        "Without `import hq_plugin`, transformers warns of an unknown quantization type and stops with a size",
        "mismatch: the weights are packed integers.",
        "",
    ]
    text = "\n".join(lines)
    return f"{text}\n{_MARK.format(_digest(text))}\n"


def _activation(bits: LayerBits) -> str:
    if bits.activation == FLOAT_BITS:
        return "float"
    return f"of {bits.activation} bits{', a step for each token' if bits.dynamic else ''}"


def _distance(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.5f}"
