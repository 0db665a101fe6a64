"""A packed model with torchao's tensors as its weights: the same integers, steps and zero points."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torchao.quantization import IntxUnpackedToInt8Tensor

from hq_plugin import adapters
from hq_plugin.errors import ModelError
from hq_plugin.nn import PackedModule, adopt, affine_weight, is_plain, packed_modules, replace_modules, weight_key
from hq_plugin.policy import FLOAT_BITS


def to_torchao(model: nn.Module) -> nn.Module:
    """Returns a copy whose packed Linear and Embedding layers hold torchao tensors, of equal value.

    Inputs of 8 bits with a step for each token stay so. Layers of other kinds, and those with other quantized
    inputs, stay packed as they are: torchao has no tensor for them.

    Args:
        model: What `quantize` or `load` returned; it is not changed.

    Raises:
        ModelError: No layer of the model fits torchao's tensors.
    """
    model = copy.deepcopy(adapters.opened(model))
    made: dict[int, nn.Module] = {}
    weights: dict[tuple[int, bool], nn.Parameter] = {}
    for layer in packed_modules(model).values():
        plain = is_plain(layer, nn.Linear) or is_plain(layer, nn.Embedding)
        if plain and (layer.bits.activation == FLOAT_BITS or _per_token(layer)):
            # A tensor says how its input is rounded: tied layers share it where they agree on that.
            key = weight_key(layer), _per_token(layer)
            if key not in weights:
                weights[key] = _weight(layer)
            made[id(layer)] = _layer(layer, weights[key])
    if not made:
        raise ModelError(
            "No layer fits torchao's tensors: they are for Linear and Embedding layers with float inputs, or 8-bit "
            'ones with a step for each token. Quantize with activation_bits=16 or activation_scheme="dynamic".'
        )
    made_of = replace_modules(model, made)
    if hasattr(made_of, "save_pretrained"):
        made_of.save_pretrained = _save_the_packed_one  # type: ignore[assignment]
    return made_of


def _save_the_packed_one(*_: Any, **__: Any) -> None:
    raise ModelError(
        "A model with torchao's tensors is not saved by save_pretrained. Save the packed model that it was made "
        "from, and call to_torchao once it is loaded."
    )


def _per_token(layer: PackedModule) -> bool:
    return layer.bits.dynamic and layer.bits.activation == 8


def _weight(layer: PackedModule) -> nn.Parameter:
    integers, step, offset = affine_weight(layer)
    # Odd integers of 1 and 2 bits need one bit more.
    least, most = int(integers.min()), int(integers.max())
    bits = next(b for b in range(max(layer.bits.weight, 1), 9) if -(2 ** (b - 1)) <= least and most < 2 ** (b - 1))
    zero = -offset
    whole = bool((zero == zero.round()).all()) and bool((zero.abs() < 128).all())
    tensor = IntxUnpackedToInt8Tensor(
        qdata=integers,
        scale=step.to(layer.weight_dtype),
        zero_point=zero.to(torch.int8) if whole else zero.to(layer.weight_dtype),
        target_dtype=getattr(torch, f"int{bits}"),
        block_size=(1, integers.shape[1] // step.shape[1]),
        dtype=layer.weight_dtype,
        activation_quantization="int8_asym_per_token" if _per_token(layer) else None,
    )
    return nn.Parameter(tensor, requires_grad=False)


def _layer(layer: PackedModule, weight: nn.Parameter) -> nn.Module:
    made: Any = adopt(layer, layer._float_type)
    made._buffers = {
        name: buffer for name, buffer in layer._buffers.items() if not name.startswith(("weight_", "activation_"))
    }
    made.register_parameter("weight", weight)
    result: nn.Module = made
    return result
