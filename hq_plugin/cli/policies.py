"""Policies from files: the options of a search space that holds one and little else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hq_plugin.cli.models import Source

if TYPE_CHECKING:
    from hq_plugin.policy import HybridPolicy


def space_of(policy: HybridPolicy, source: Source, given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns fields of `Config` for meta-training that ends in one policy.

    Args:
        policy: Written by hand, or decided for the same model before.
        source: The float model.
        given: Fields that the user gave; they come before what the policy says.
    """
    from torch import nn

    from hq_plugin.nn.split import table_place

    modules = dict(source.model.named_modules())
    tables = {name: place for name in policy if name not in modules and (place := table_place(name)) is not None}
    embeddings = {name for name in policy if name in tables or isinstance(modules.get(name), nn.Embedding)}
    # A model may consist of embeddings alone.
    layers = [bits for name, bits in policy.items() if name not in embeddings] or list(policy.values())
    options: dict[str, Any] = {
        "finetune_from": "closest",  # what is meta-trained for one policy is trained for it already
        "weight_bits": _ascending(bits.weight for bits in layers if bits.weight),
        "activation_bits": _ascending(bits.activation for bits in layers),
        "activation_scheme": "dynamic" if any(bits.dynamic for bits in layers) else "static",
        "embedding_parts": max((part + 1 for _, part, _ in tables.values()), default=1),
        "embedding_columns": max(((columns or 0) + 1 for *_, columns in tables.values()), default=1),
    }
    if embeddings:
        options["embedding_bits"] = _ascending(policy[name].weight for name in embeddings)
    options |= given
    return {"group_size": _group_size(policy, source, options), **options}


def _group_size(policy: HybridPolicy, source: Source, options: Mapping[str, Any]) -> int | tuple[int, ...]:
    """Returns the choice that gives a policy's group sizes: of several, that of the model's library."""
    from hq_plugin.config import Config

    sizes = _ascending(bits.group_size for bits in policy.values())
    if len(sizes) == 1:
        return sizes[0]
    config = Config().with_options(options)
    proposed = {} if source.adapter is None else source.adapter.options(source.model, config)
    usual: int | tuple[int, ...] = proposed.get("group_size", 0)
    if {*sizes} <= {0, *(usual if isinstance(usual, tuple) else (usual,))}:
        return usual
    # A single size leaves whole channels to layers whose inputs it does not divide.
    return sizes if len(sizes) > 2 or sizes[0] else sizes[1]


def _ascending(widths: Any) -> tuple[int, ...]:
    return tuple(sorted(set(widths)))
