"""HQQ: half-quadratic quantization of a language model's linear layers, groups of 64, no calibration."""

from __future__ import annotations

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from hqq.models.hf.base import AutoHQQHFModel

from tests.benchmarks.rivals import hand

GROUP = 64


def main() -> None:
    """Quantizes and answers."""
    task = hand.task()
    model, teacher = task.language_model(), task.language_model()
    rest = hand.float_rest(model, hand.linear_layers(model))
    bits = int(task.bits)
    if bits != task.bits:
        raise ValueError(f"HQQ has one width for all layers, a whole number of bits, not {task.bits:g}")
    with task.stage("quantize"):
        config = BaseQuantizeConfig(nbits=bits, group_size=GROUP)
        AutoHQQHFModel.quantize_model(model, quant_config=config, compute_dtype=torch.float32, device="cpu")
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, HQQLinear):
            elements = module.in_features * module.out_features
            groups = elements // GROUP
            layers[name] = {"bits": bits, "elements": elements, "scales": groups, "zeros": groups, "zero_bits": 16}
    task.answer(
        layers, float_elements=rest, packages=("hqq", "transformers"), measured=task.fidelity(model, teacher)
    )


if __name__ == "__main__":
    main()
