"""A model of hundreds of layers that exists only as numbers: real search space, costs and plans, made-up losses."""

from __future__ import annotations

from functools import cache

import numpy as np

from hq_plugin import Budget, Config
from hq_plugin.allocation import best_uniform, dynamic_programming, monotone
from hq_plugin.cost import CostTable, Table
from hq_plugin.findings import group_sensitivities, predicted_front, predicted_loss, scored_history
from hq_plugin.front import convex_front
from hq_plugin.outline import Outline
from hq_plugin.result import Baseline, Result, versions
from hq_plugin.search import Scored
from hq_plugin.sites import FloatLayer, Site, SiteTable
from hq_plugin.space import SearchSpace

LAYERS = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}


@cache
def large_outline(blocks: int = 57) -> Outline:
    """57 blocks of a language model and its head: 400 layers."""
    shapes = {f"model.layers.{n}.{name}": shape for n in range(blocks) for name, shape in LAYERS.items()}
    shapes["lm_head"] = (8000, 576)
    sites = tuple(
        Site(name, "linear", shape, shape[0] * shape[1] * 128, shape[1] * 128, name, name, "Linear")
        for name, shape in shapes.items()
    )
    norms = tuple(
        FloatLayer(f"model.layers.{n}.norm", "RMSNorm", 576, "RMSNorm is not a Linear") for n in range(blocks)
    )
    weights = sum(site.numel for site in sites)
    table = SiteTable(sites, norms, 4 * weights + 4 * 576 * blocks, 4 * 576 * blocks)
    space = SearchSpace.build(table, Config(weight_bits=(2, 3, 4, 5, 6, 8), activation_bits=(4, 8)).filled())
    costs = CostTable(space)
    return Outline("large", "KL divergence", space, costs, _sensitivities(space), (), ())


def _sensitivities(space: SearchSpace) -> Table:
    rng = np.random.RandomState(0)
    depth = np.linspace(0, 1, len(space.groups))
    scale = np.exp(rng.normal(0, 1, len(space.groups)) - 2 * depth) * 1e-2
    weights = scale[:, None] * 4.0 ** -(np.array(space.weight_bits) - 2)
    activations = scale[:, None] * 0.3 * np.array([1.0, 0.0])
    return (weights - weights[:, -1:])[:, :, None] + activations[:, None, :]


@cache
def large_result(budget: str = "3bit") -> Result:
    """What a search might have given: plans for losses with noise, scored by the losses with other noise."""
    outline = large_outline()
    space, costs, losses = outline.space, outline.costs, outline.sensitivities
    resources = costs.resources(Budget.parse(budget))
    rng = np.random.RandomState(1)
    evaluations = []
    for _ in range(30):
        noisy = monotone(losses * np.exp(rng.normal(0, 0.5, losses.shape)))
        fitting = [g for g in convex_front(noisy, resources[0].cost, 100) if resources[0].used(g) <= 1]
        evaluations.append(Scored(fitting[-1], predicted_loss(losses, fitting[-1]) * np.exp(rng.normal(0, 0.2))))
    best = min(evaluations, key=lambda scored: scored.score)
    candidates = {
        "searched": best.genome,
        "dynamic_programming": dynamic_programming(monotone(losses), resources),
        "uniform": best_uniform(space, costs, resources)[0],
    }
    config = Config(activation_bits=(4, 8)).filled()
    policy = space.policy(best.genome)
    return Result(
        policy=policy,
        budget=budget,
        chosen="searched",
        costs=costs.costs(best.genome),
        used={resource.name: resource.used(best.genome) for resource in resources},
        float_size=space.table.float_bytes,
        kl=best.score / 3,
        baselines={
            name: Baseline(name, space.policy(genome), costs.costs(genome), predicted_loss(losses, genome))
            for name, genome in candidates.items()
        },
        layers=costs.layers(policy),
        float_layers=[vars(layer) for layer in space.table.float_layers],
        agreement=0.93,
        history={
            "search": scored_history(costs, evaluations),
            "meta_training": [{"step": n, "loss": float(np.exp(-n / 300))} for n in range(500)],
            "finetune": [{"step": n, "loss": float(np.exp(-3 - n / 900))} for n in range(2000)],
        },
        seconds={
            "sensitivities": 61.0,
            "meta_training": 1840.0,
            "search": 610.0,
            "finetune": 7410.0,
            "convert": 3.0,
        },
        memory={"meta_training": {"process": 3 << 30, "cuda": 2 << 30}, "finetune": {"process": 5 << 30}},
        config=config.to_json(),
        versions=versions(),
        model="large",
        distance="KL divergence",
        sensitivities=group_sensitivities(space, losses),
        front=predicted_front(costs, losses, resources[0].cost),
    )
