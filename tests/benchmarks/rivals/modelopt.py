"""NVIDIA ModelOpt: `auto_quantize` over integer formats with 8-bit inputs; then, for QAT, our training loop.

Formats are those of its INT8_DEFAULT_CFG, which its documentation recommends for convolutional networks, with
other widths of the weight: symmetric, a scale for each output channel, calibrated by maximum. Scores are by its
default method, gradients, from the cross-entropy of labelled images. 512 images calibrate, 128 batches score.
"""

from __future__ import annotations

import copy
from typing import Any

import modelopt.torch.quantization as mtq
import torch
import torch.nn.functional as F

from tests.benchmarks.rivals import hand

WIDTHS = (2, 3, 4, 6, 8)


def main() -> None:
    """Quantizes, trains where asked, and answers."""
    task = hand.task()
    network = task.network()
    for module in network.modules():
        if hasattr(module, "inplace"):  # its gradient scores hang on hooks, which forbid that
            module.inplace = False
    layers = hand.weight_layers(network)
    elements = {name: module.weight.numel() for name, module in layers.items()}
    biases = hand.folded_biases(network)
    teacher = copy.deepcopy(network)
    data = task.tensors("train")
    rows = torch.randperm(len(data["images"]), generator=torch.Generator().manual_seed(task.seed))[: 128 * 32]
    batches = list(zip(data["images"][rows].split(32), data["labels"][rows].split(32), strict=True))
    formats: list[dict[str, Any] | str] = [
        {
            "quant_cfg": [
                {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": bits, "axis": 0}},
                {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": 8, "axis": None}},
            ],
            "algorithm": "max",
        }
        for bits in WIDTHS
    ]
    # Its budget knows no scales: one of 16 bits for each output channel is taken off first.
    asked = task.bits - 16 * biases / sum(elements.values())
    with task.stage("search"):
        network, _ = mtq.auto_quantize(
            network,
            constraints={"effective_bits": asked},
            quantization_formats=formats,
            data_loader=batches,
            forward_step=lambda model, batch: model(batch[0]),
            loss_func=lambda output, batch: F.cross_entropy(output, batch[1]),
            num_calib_steps=16,
            num_score_steps=128,
        )
    if task.variant.endswith("QAT"):
        with task.stage("train"):
            task.distil(network, teacher)
    chosen = {}
    inputs = 0
    for name, module in network.named_modules():
        if name not in elements:
            continue
        quantizer: Any = module.weight_quantizer
        bits = quantizer.num_bits if quantizer.is_enabled else 32
        scales = quantizer.amax.numel() if quantizer.is_enabled else 0
        chosen[name] = {"bits": bits, "elements": elements[name], "scales": scales}
        inputs += int(module.input_quantizer.is_enabled)
    task.answer(
        chosen,
        float_elements=biases,
        activation_bits=8,
        activation_tensors=inputs,
        packages=("nvidia-modelopt",),
        logits=task.logits(network),
    )


if __name__ == "__main__":
    main()
