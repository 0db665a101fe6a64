"""A policy as torchao's own configuration: torchao rounds the float weights anew, with our widths."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torchao.quantization import FqnToConfig, IntxWeightOnlyConfig, PerAxis, PerGroup
from torchao.quantization.quant_primitives import MappingType

from hq_plugin.policy import HybridPolicy


def torchao_config(policy: HybridPolicy) -> FqnToConfig:
    """Returns what `torchao.quantization.quantize_(float_model, config, filter_fn=None)` takes.

    Only the widths and group sizes of weights go along: torchao rounds to nearest, and knows nothing of the
    weights that were trained. `to_torchao` keeps those.

    Args:
        policy: The policy; its layers must be Linear or Embedding for torchao to quantize them.
    """
    configs: OrderedDict[str, IntxWeightOnlyConfig] = OrderedDict()
    for name, bits in policy.items():
        configs[name] = IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{bits.weight}"),
            granularity=PerGroup(bits.group_size) if bits.group_size else PerAxis(0),
            mapping_type=MappingType.ASYMMETRIC if bits.group_size else MappingType.SYMMETRIC,
        )
    return FqnToConfig(configs)
