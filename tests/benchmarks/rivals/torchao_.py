"""torchao: `IntxWeightOnlyConfig` on a language model's linear layers, groups of 64, symmetric (its default).

The second variant chooses scales by its `HQQ_SCALE_ONLY` algorithm.
"""

from __future__ import annotations

import torch
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup
from torchao.quantization.quant_api import IntxChooseQParamsAlgorithm

from tests.benchmarks.rivals import hand

GROUP = 64


def main() -> None:
    """Quantizes and answers."""
    task = hand.task()
    model, teacher = task.language_model(), task.language_model()
    names = hand.linear_layers(model)
    rest = hand.float_rest(model, names)
    bits = int(task.bits)
    if bits != task.bits:
        raise ValueError(f"torchao has one width for what a configuration names, not a mean of {task.bits:g} bits")
    layers = {
        name: {"bits": bits, "elements": module.weight.numel(), "scales": module.weight.numel() // GROUP}
        for name, module in names.items()
    }
    algorithm = IntxChooseQParamsAlgorithm.AFFINE
    if "HQQ" in task.variant:
        algorithm = IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY
    with task.stage("quantize"):
        config = IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{bits}"),
            granularity=PerGroup(GROUP),
            intx_choose_qparams_algorithm=algorithm,
        )
        quantize_(model, config, filter_fn=lambda module, name: name in names)
    task.answer(
        layers, float_elements=rest, packages=("torchao", "transformers"), measured=task.fidelity(model, teacher)
    )


if __name__ == "__main__":
    main()
