"""Sony's model-compression-toolkit: mixed precision under a weights' memory; then its gradient-based PTQ.

The target platform is its default, IMX500: 2, 4 or 8 bits, symmetric, a threshold for each output channel;
activations of 8 bits with power-of-two thresholds. Calibration is 20 batches of 50 images, as in its tutorials;
GPTQ takes 300 steps of 128 images, layers weighted by Hessians, with gradual activation quantization. Of its
defaults one is off, weights for each sample: their Hessians alone would take hours on a CPU.
"""

# ruff: noqa: E402 (torchvision is looked after first)
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from tests.benchmarks.rivals import hand

hand.stub_torchvision()
# isort: split
import model_compression_toolkit as mct
from torch import Tensor

EPOCHS = 5


def representative(batches: list[Tensor]) -> Callable[[], Iterator[list[Tensor]]]:
    """Returns what MCT calls a representative data generator."""

    def generate() -> Iterator[list[Tensor]]:
        for batch in batches:
            yield [batch]

    return generate


def main() -> None:
    """Quantizes and answers."""
    task = hand.task()
    network = task.network()
    layers = hand.weight_layers(network)
    elements = sum(module.weight.numel() for module in layers.values())
    biases = hand.folded_biases(network)
    # Its budget knows no scales: one of 16 bits for each output channel is taken off first.
    memory = task.bits * elements / 8 - 2 * biases
    shared: dict[str, Any] = {
        "target_resource_utilization": mct.core.ResourceUtilization(weights_memory=memory),
        "core_config": mct.core.CoreConfig(
            mixed_precision_config=mct.core.MixedPrecisionQuantizationConfig(num_of_images=32)
        ),
        "target_platform_capabilities": mct.get_target_platform_capabilities(),
    }
    calibration = representative(task.batches(20, 50))
    if task.variant.endswith("GPTQ"):
        training = representative(task.batches(hand.STEPS // EPOCHS, hand.BATCH))
        with task.stage("search_and_train"):
            quantized, _ = mct.gptq.pytorch_gradient_post_training_quantization(
                network,
                calibration,
                gptq_config=mct.gptq.get_pytorch_gptq_config(EPOCHS, use_hessian_sample_attention=False),
                gptq_representative_data_gen=training,
                **shared,
            )
    else:
        with task.stage("search"):
            quantized, _ = mct.ptq.pytorch_post_training_quantization(network, calibration, **shared)
    chosen: dict[str, dict[str, Any]] = {}
    for name, module in quantized.named_modules():
        for quantizer in getattr(module, "weights_quantizers", {}).values():
            weight = module.get_quantized_weights()["weight"]
            chosen[name] = {"bits": quantizer.num_bits, "elements": weight.numel(), "scales": weight.shape[0]}
    counted = sum(layer["elements"] for layer in chosen.values())
    if counted != elements:
        raise RuntimeError(f"{counted} of {elements} weights are quantized")
    task.answer(
        chosen,
        float_elements=biases,
        activation_bits=8,
        activation_tensors=sum("ActivationQuantizationHolder" in type(m).__name__ for m in quantized.modules()),
        packages=("model-compression-toolkit",),
        logits=task.logits(quantized),
    )


if __name__ == "__main__":
    main()
