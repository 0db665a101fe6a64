"""Packed layers: what a converted model is made of."""

from hq_plugin.nn.folded import float_type
from hq_plugin.nn.forms import with_layers_of
from hq_plugin.nn.held import HeldWeight, with_held_weights
from hq_plugin.nn.packed import (
    INPUT_BUFFERS,
    WEIGHT_BUFFERS,
    PackedConv1d,
    PackedConv2d,
    PackedEmbedding,
    PackedLinear,
    PackedModule,
    adopt,
    affine_weight,
    cache_weights,
    check_unedited,
    is_plain,
    packed_modules,
    packed_type,
    share_packed_weight,
    weight_key,
    with_first,
)
from hq_plugin.nn.plain import parametrized_weight, with_plain_weights
from hq_plugin.nn.replacing import HOOKS, replace_modules, take_over_hooks
from hq_plugin.nn.split import SplitEmbedding, with_split_tables

__all__ = [
    "HOOKS",
    "INPUT_BUFFERS",
    "WEIGHT_BUFFERS",
    "HeldWeight",
    "PackedConv1d",
    "PackedConv2d",
    "PackedEmbedding",
    "PackedLinear",
    "PackedModule",
    "SplitEmbedding",
    "adopt",
    "affine_weight",
    "cache_weights",
    "check_unedited",
    "float_type",
    "is_plain",
    "packed_modules",
    "packed_type",
    "parametrized_weight",
    "replace_modules",
    "share_packed_weight",
    "take_over_hooks",
    "weight_key",
    "with_first",
    "with_held_weights",
    "with_layers_of",
    "with_plain_weights",
    "with_split_tables",
]
