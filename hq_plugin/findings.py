"""Turns what a session found out into the plain data of a `Result`. Nothing here measures or decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from torch import nn

from hq_plugin import adapters
from hq_plugin.cost import CostTable, Table
from hq_plugin.front import convex_front
from hq_plugin.lasting import LastingLosses
from hq_plugin.nn import packed_modules
from hq_plugin.result import LayerReport, Sensitivity
from hq_plugin.search import Scored
from hq_plugin.space import Genome, SearchSpace

#: Points of a predicted front.
FRONT = 60


def model_name(model: nn.Module) -> str:
    """Returns what a model is called in reports: its name in the library that it is from, or its class."""
    description = adapters.describe(model) or {}
    return str(description.get("name") or type(model).__name__)


def group_sensitivities(space: SearchSpace, table: Table) -> list[Sensitivity]:
    """Takes a table of additive sensitivities apart: what weights cost, and what activations cost."""
    found = []
    for g, group in enumerate(space.groups):
        weights, activations = len(group.weight_bits), len(group.activation_bits)
        top = table[g, weights - 1, activations - 1]
        found.append(
            Sensitivity(
                sites=tuple(site.name for site in group.sites),
                weight_bits=group.weight_bits,
                weight=tuple(table[g, :weights, activations - 1].tolist()),
                activation_bits=group.activation_bits,
                activation=tuple((table[g, weights - 1, :activations] - top).tolist()),
            )
        )
    return found


def with_activations(layers: list[LayerReport], packed: nn.Module) -> list[LayerReport]:
    """Adds to each layer how its input is quantized."""
    modules = packed_modules(packed)
    return [
        replace(
            layer,
            activation_step=float(modules[layer.name].activation_step),
            activation_zero_point=int(modules[layer.name].activation_zero_point),
        )
        if modules[layer.name].bits.static_input
        else layer
        for layer in layers
    ]


def predicted_loss(sensitivities: Table, genome: Genome) -> float:
    """Returns the rise of the distance that additive sensitivities predict for a policy; noise below 0 is 0."""
    return max(float(sensitivities[np.arange(len(genome)), genome[:, 0], genome[:, 1]].sum()), 0.0)


def predicted_front(
    costs: CostTable, sensitivities: Table, losses: LastingLosses, cost: Table
) -> list[dict[str, Any]]:
    """Predicts the best policies over one cost from additive sensitivities.

    Args:
        costs: What policies cost.
        sensitivities: Additive losses, which predict the distance before fine-tuning.
        losses: What lasts of them, by which policies are planned.
        cost: The one of the costs that is traded for closeness.

    Returns:
        From the cheapest policy to the closest, for each the fields of `Costs` and `"predicted"`.
    """
    return [
        {**asdict(costs.costs(genome)), "predicted": predicted_loss(sensitivities, genome)}
        for genome in convex_front(losses.table, cost, FRONT)
    ]


def scored_history(costs: CostTable, evaluations: Sequence[Scored]) -> list[dict[str, Any]]:
    """Lists what a search scored, in that order, with what each policy costs."""
    return [
        {
            "evaluation": n,
            "policy": costs.space.policy(scored.genome).to_json(),
            "score": scored.score,
            **asdict(costs.costs(scored.genome)),
        }
        for n, scored in enumerate(evaluations)
    ]
