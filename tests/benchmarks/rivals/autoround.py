"""Intel auto-round: `AutoScheme` chooses 2, 3, 4 or 8 bits a layer for a mean, then rounding is tuned by blocks.

Groups of 64, asymmetric. Its defaults (200 steps a block of 8 × 2,048 tokens) are for GPUs; this is its light
recipe (50 steps, rate 5e-3), with 64 samples of 256 tokens and batches of 4, so that a step has the 1,024 tokens
of a step of hq_plugin's.
"""

from __future__ import annotations

from typing import Any

from auto_round import AutoRound, AutoScheme
from auto_round.schemes import QuantizationScheme

from tests.benchmarks.rivals import hand

GROUP, WIDTHS = 64, (2, 3, 4, 8)
ITERATIONS, SAMPLES, LENGTH, BATCH = 50, 64, 256, 4


def main() -> None:
    """Quantizes and answers."""
    task = hand.task()
    model, teacher = task.language_model(), task.language_model()
    linear = hand.linear_layers(model)
    elements = {name: module.weight.numel() for name, module in linear.items()}
    rest = hand.float_rest(model, linear)
    data = task.given["files"]["calibration"]
    options = [QuantizationScheme(bits=bits, group_size=GROUP, sym=False, data_type="int") for bits in WIDTHS]
    scheme = AutoScheme(
        avg_bits=task.bits, options=options, nsamples=16, seqlen=LENGTH, dataset=data, enable_torch_compile=False
    )
    with task.stage("search_and_tune"):
        tuner = AutoRound(
            model,
            tokenizer=task.tokenizer(),
            scheme=scheme,
            dataset=data,
            iters=ITERATIONS,
            lr=5e-3,
            nsamples=SAMPLES,
            seqlen=LENGTH,
            batch_size=BATCH,
            seed=task.seed,
            enable_torch_compile=False,
            device_map="cpu",
        )
        found = tuner.quantize()
    quantized, config = found if isinstance(found, tuple) else (found, tuner.layer_config)
    layers: dict[str, dict[str, Any]] = {}
    for name, count in elements.items():
        bits = int(config.get(name, {}).get("bits") or 16)
        layers[name] = {"bits": bits, "elements": count}
        if bits < 16:
            layers[name]["scales"] = count // GROUP
            if not config[name].get("sym"):  # it makes 8 bits symmetric
                layers[name] |= {"zeros": count // GROUP, "zero_bits": bits}
    task.answer(
        layers,
        float_elements=rest,
        packages=("auto-round", "transformers"),
        measured=task.fidelity(quantized.float(), teacher),
    )


if __name__ == "__main__":
    main()
