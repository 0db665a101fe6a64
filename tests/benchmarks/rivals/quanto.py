"""optimum-quanto: one width for all layers (it has 2 and 4 bits, in groups of up to 128, and 8), or QAT of that.

Images: weights and 8-bit activations, calibrated on 512 images in its `Calibration`; QAT is training before
`freeze`, as its documentation says, by our loop. Language: weights only, without the head.
"""

# ruff: noqa: E402 (torchvision is looked after first)
from __future__ import annotations

import copy
from typing import Any

from tests.benchmarks.rivals import hand

hand.stub_torchvision()
# isort: split
import torch
from optimum.quanto import Calibration, freeze, qint2, qint4, qint8, quantize
from optimum.quanto.nn import QModuleMixin

WIDTHS = {2.0: qint2, 4.0: qint4, 8.0: qint8}


def layers(model: torch.nn.Module) -> dict[str, dict[str, Any]]:
    """Counts the layers of a model: a scale, and where weights are of 2 or 4 bits a float shift, for each group."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, QModuleMixin) and module.weight_qtype is not None:
            elements, rows = module.weight.numel(), module.weight.shape[0]
            groups = elements // module.weight_group_size if module.weight_group_size else rows
            bits = module.weight_qtype.bits
            found[name] = {"bits": bits, "elements": elements, "scales": groups}
            if bits < 8:
                found[name] |= {"zeros": groups, "zero_bits": 16}
    return found


def main() -> None:
    """Quantizes, trains where asked, and answers."""
    task = hand.task()
    if task.bits not in WIDTHS:
        raise ValueError(f"quanto has weights of {', '.join(f'{w:g}' for w in WIDTHS)} bits, not {task.bits:g}")
    weights = WIDTHS[task.bits]
    if task.model == "smollm2":
        language(task, weights)
        return
    network = task.network()
    teacher, biases = copy.deepcopy(network), hand.folded_biases(network)
    with task.stage("quantize"), torch.no_grad():
        quantize(network, weights=weights, activations=qint8)
        with Calibration():
            for images in task.batches(4, 128):
                network(images)
    if task.variant.endswith("QAT"):
        with task.stage("train"):
            task.distil(network, teacher)
    freeze(network)
    chosen = layers(network)
    task.answer(
        chosen,
        float_elements=biases,
        activation_bits=8,
        activation_tensors=2 * len(chosen),
        packages=("optimum-quanto",),
        logits=task.logits(network),
    )


def language(task: hand.Task, weights: Any) -> None:
    """Quantizes a language model's weights."""
    model, teacher = task.language_model(), task.language_model()
    names = hand.linear_layers(model)
    rest = hand.float_rest(model, names)
    with task.stage("quantize"):
        quantize(model, weights=weights, exclude="lm_head")
        freeze(model)
    task.answer(
        layers(model),
        float_elements=rest,
        packages=("optimum-quanto", "transformers"),
        measured=task.fidelity(model, teacher),
    )


if __name__ == "__main__":
    main()
