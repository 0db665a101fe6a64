"""A policy as torchao's own configuration: torchao rounds the float weights anew, with our widths."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torchao.quantization import FqnToConfig, IntxWeightOnlyConfig, PerAxis, PerGroup
from torchao.quantization.quant_primitives import MappingType

from hq_plugin.errors import PolicyError
from hq_plugin.nn.split import tables_of
from hq_plugin.policy import LEFT_OUT, HybridPolicy


def torchao_config(policy: HybridPolicy) -> FqnToConfig:
    """Returns what `torchao.quantization.quantize_(float_model, config, filter_fn=None)` takes.

    Only the widths and group sizes of weights go along: torchao rounds to nearest, and knows nothing of the
    weights that were trained. `to_torchao` keeps those.

    Args:
        policy: The policy; its layers must be Linear or Embedding for torchao to quantize them.

    Raises:
        PolicyError: It leaves a layer out (0 bits), or names tables of a split embedding: the float model has none.
    """
    left_out = [name for name, bits in policy.items() if bits.weight == LEFT_OUT]
    for names, what, remedy in (
        (tables_of(policy), "names tables of a split embedding", "embedding_parts=1, embedding_columns=1"),
        (left_out, "leaves out (0 bits)", "embedding_bits without 0"),
    ):
        if names:
            raise PolicyError(
                f"The policy {what}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}. torchao's "
                f"configuration is for layers of the float model, 1 to 8 bits. Search with {remedy}; or use "
                "to_torchao(model)."
            )
    configs: OrderedDict[str, IntxWeightOnlyConfig] = OrderedDict()
    for name, bits in policy.items():
        configs[name] = IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{bits.weight}"),
            granularity=PerGroup(bits.group_size) if bits.group_size else PerAxis(0),
            mapping_type=MappingType.ASYMMETRIC if bits.group_size else MappingType.SYMMETRIC,
        )
    return FqnToConfig(configs)
