"""Rewrites a copy of a model before its sites are found.

Weights that no layer holds, that a layer computes, or that are tables of many rows become layers to which
`sites.py` can give widths of their own.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hq_plugin.config import Config
from hq_plugin.nn.held import held_name, with_held_weights
from hq_plugin.nn.plain import parametrized_weight, with_plain_weights
from hq_plugin.nn.split import BASIS, PARTS, principal_axes, split_embeddings, with_split_tables
from hq_plugin.probe import probe
from hq_plugin.sites import KINDS, excluded
from hq_plugin.state import state_tensors
from hq_plugin.storage import fingerprint

#: Embeddings of fewer rows are one table.
_SMALLEST_SPLIT = 4096

#: Parameters of fewer elements are not worth a layer of their own.
_SMALLEST_HELD = 256


def hold_parameters(model: nn.Module, run: Callable[[nn.Module], Any]) -> nn.Module:
    """Returns a copy of a model whose parameters that are matrices of products are layers of their own.

    Layers are left as they are, since they are sites already; so is a parameter that two modules share.
    Without any such parameter the model itself is returned.

    Args:
        model: A model; it is not changed.
        run: Runs the model once on one batch.
    """
    places: dict[int, list[str]] = {}
    parameters: dict[int, Tensor] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                layer = isinstance(module, tuple(KINDS.values())) or parametrize.is_parametrized(module)
                places.setdefault(id(parameter), []).append("" if layer else f"{path}.{name}".lstrip("."))
                parameters[id(parameter)] = parameter
    watched = {
        key: parameters[key]
        for key, names in places.items()
        if len(names) == 1 and names[0] and _may_be_held(parameters[key])
    }
    if not watched:
        return model
    reads = probe(model, {}, watched, run).reads
    return with_held_weights(model, [held_name(places[key][0]) for key in watched if key in reads])


def plain_weights(model: nn.Module, run: Callable[[nn.Module], Any], config: Config) -> nn.Module:
    """Returns a copy of a model whose layers with a computed weight (weight norm) have its value as a parameter.

    Only those that run, which will be sites: whoever loads the model knows them by that. Without any such layer, or
    where `config` leaves them float, the model itself is returned.

    Args:
        model: A model in eval mode; it is not changed.
        run: Runs the model once on one batch.
        config: Says which layers stay as they are.
    """
    found = {
        name: (kind, module)
        for name, module in model.named_modules()
        if parametrized_weight(module)
        and not excluded(name, config.exclude)
        and (kind := next((kind for kind, base in KINDS.items() if isinstance(module, base)), None))
    }
    return with_plain_weights(model, probe(model, found, {}, run).calls) if found else model


def splittable(model: nn.Module, config: Config) -> list[str]:
    """Returns the large embeddings that are split into tables with a width each.

    Not those that subclasses of Embedding look up, that share their weight with another layer, or that an option
    names; none where `config` asks for one table.

    Args:
        model: A model.
        config: Gives the number of tables, and the patterns of its options.
    """
    parts = config.embedding_parts or 1
    patterns = [*(config.pinned or {}), *(pattern for group in config.groups for pattern in group)]
    users: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            users[id(parameter)] = users.get(id(parameter), 0) + 1

    def splits(name: str, module: nn.Module) -> bool:
        if type(module) is not nn.Embedding or len(module.weight) < _SMALLEST_SPLIT or users[id(module.weight)] > 1:
            return False
        special = module.max_norm is not None or module.sparse or module.scale_grad_by_freq
        named = excluded(name, config.exclude) or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        return bool(name) and not special and not named

    return [name for name, module in model.named_modules() if parts > 1 and splits(name, module)]


def split_tables(model: nn.Module, config: Config, by_use: Mapping[str, Tensor]) -> nn.Module:
    """Returns a copy of a model whose large embeddings are split; without any, the model itself.

    Args:
        model: A model; it is not changed.
        config: Gives the number of tables, and of their blocks of columns.
        by_use: The rows of each embedding that is split, by name, in the order in which they lie in the tables.
    """
    last, columns = (config.embedding_parts or 1) - 1, config.embedding_columns or 1
    tables = [f"{name}.{PARTS}.{last}" + (f".{columns - 1}" if columns > 1 else "") for name in by_use]
    if columns == 1:
        return with_split_tables(model, tables, by_use=by_use)
    weights: dict[str, Any] = {name: model.get_submodule(name).weight for name in by_use}
    axes = {name: principal_axes(weight) for name, weight in weights.items()}
    made = with_split_tables(model, tables, by_use=by_use, axes=axes)
    for name, whole in split_embeddings(made).items():
        whole.original = fingerprint({"weight": weights[name]}) if name in weights else ""
    return made


def float_state(teacher: nn.Module) -> dict[str, Tensor]:
    """Returns the state by which a teacher is known again: where rows were turned, what they were before.

    Axes of another machine, or of another number of threads, differ in their last bits.
    """
    state = state_tensors(teacher)
    for name, whole in split_embeddings(teacher).items():
        if whole.basis is not None:
            turned = (f"{name}.{PARTS}.", f"{name}.{BASIS}.")
            state = {key: value for key, value in state.items() if not key.startswith(turned)}
            state[f"{name}.original"] = torch.tensor(list(whole.original.encode()), dtype=torch.uint8)
    return state


def _may_be_held(parameter: Tensor) -> bool:
    if isinstance(parameter, nn.parameter.UninitializedParameter) or not parameter.is_floating_point():
        return False
    # What has one row or one column is no matrix; a leading 1 may be the one expert that there is.
    matrix = parameter.shape[1:] if parameter.dim() > 2 else parameter.shape
    return parameter.dim() > 1 and parameter.numel() >= _SMALLEST_HELD and 1 not in matrix
