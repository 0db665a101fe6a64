"""The outline of a model of 400 layers that exists only as numbers: real search space and costs, made-up losses."""

from __future__ import annotations

import numpy as np

from hq_plugin import Config
from hq_plugin.cost import CostTable, Table
from hq_plugin.outline import Outline
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
