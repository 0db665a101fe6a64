"""Exact costs of policies: bytes, effective bits and BitOps, and a budget as capacities over them.

Every cost is a table `[groups, weight widths, activation widths]` that adds up over groups, so that a
policy costs a lookup and a sum. Which policy to take is `allocation.py` and `search.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hq_plugin.budget import Budget, format_bytes, format_count
from hq_plugin.errors import BudgetError
from hq_plugin.packing import packed_bytes
from hq_plugin.policy import LEFT_OUT, HybridPolicy, LayerBits
from hq_plugin.result import Costs, LayerReport
from hq_plugin.sites import Site
from hq_plugin.space import Genome, SearchSpace
from hq_plugin.stored_qparams import ACTIVATION_QPARAM_BYTES, ZERO_BITS, step_bytes

Table = NDArray[np.float64]

#: Picojoules at 45 nm (M. Horowitz, "Computing's energy problem", ISSCC 2014, figure 1.1.9): an 8-bit integer
#: multiplication, a 32-bit integer addition, and reading one bit from DRAM (1.3 nJ and more for 64 bits).
#: A multiplication is taken to grow with the product of its widths.
ENERGY = {"multiply_8bit": 0.2, "add_32bit": 0.1, "dram_bit": 20.0}


@dataclass(frozen=True)
class Resource:
    """One limit of a budget over the choices of a space.

    Attributes:
        name: The field of `Costs` and of the budget: `"weight_bits"`, `"size"`, `"bitops"` and so on.
        cost: `[groups, weight widths, activation widths]`; infinite where a group lacks the width.
        capacity: What the groups may cost together, in the unit of `cost`.
        base: Cost that no choice changes; it counts towards the limit and is in neither of the others.
    """

    name: str
    cost: Table
    capacity: float
    base: float = 0.0

    def spent(self, genome: Genome) -> float:
        """Returns what a genome costs, without `base`."""
        return float(self.cost[np.arange(len(genome)), genome[:, 0], genome[:, 1]].sum())

    def used(self, genome: Genome) -> float:
        """Returns the share of the limit that a genome uses, `base` included; above 1 is too much."""
        return (self.spent(genome) + self.base) / (self.capacity + self.base)


def weight_bytes(shape: tuple[int, ...], bits: LayerBits) -> int:
    """Returns the bytes of a weight of a shape: packed integers, steps and zero points."""
    if bits.weight == LEFT_OUT:
        return 0
    numel = math.prod(shape)
    packed = packed_bytes(numel, bits.weight)
    if bits.group_size:
        groups = numel // bits.group_size
        return packed + step_bytes(groups) + packed_bytes(groups, ZERO_BITS)
    return packed + step_bytes(shape[0])


class CostTable:
    """What each choice of a search space costs.

    Args:
        space: The search space.

    Attributes:
        weight_bytes: Packed weights, their steps and zero points.
        activation_bytes: Steps and zero points of quantized inputs.
        bitops: Multiply-accumulates × weight bits × activation bits of one sample; an input that stays
            float counts as 16 bits.
        energy: Microjoules of one sample: multiplications, additions, and each weight read once.
        latency: Milliseconds of one forward of `latency_batch` samples, once a profile is known;
            `latency_rest` is what no width changes.
    """

    def __init__(self, space: SearchSpace) -> None:
        self.space = space
        shape = (
            len(space.groups),
            max(len(group.weight_bits) for group in space.groups),
            max(len(group.activation_bits) for group in space.groups),
        )
        self.weight_bytes = np.full(shape, np.inf)
        self.activation_bytes = np.full(shape, np.inf)
        self.bitops = np.full(shape, np.inf)
        self.energy = np.full(shape, np.inf)
        self.latency: Table | None = None
        self.latency_rest, self.latency_batch = 0.0, 0
        for g, group in enumerate(space.groups):
            for w in range(len(group.weight_bits)):
                for a in range(len(group.activation_bits)):
                    chosen = [(site, group.bits(site, w, a)) for site in group.sites]
                    self.weight_bytes[g, w, a] = sum(self.site_bytes(site, bits) for site, bits in chosen)
                    self.activation_bytes[g, w, a] = sum(
                        ACTIVATION_QPARAM_BYTES for _, bits in chosen if bits.static_input
                    )
                    self.bitops[g, w, a] = sum(site.macs * bits.weight * bits.activation for site, bits in chosen)
                    macs = sum(site.macs for site, _ in chosen)
                    self.energy[g, w, a] = 1e-6 * (
                        ENERGY["multiply_8bit"] * self.bitops[g, w, a] / 64
                        + ENERGY["add_32bit"] * macs
                        + ENERGY["dram_bit"] * 8 * self.weight_bytes[g, w, a]
                    )

    @staticmethod
    def site_bytes(site: Site, bits: LayerBits) -> int:
        """Returns the bytes of a site's packed weights, steps, zero points and places; 0 if it shares another's."""
        return weight_bytes(site.weight_shape, bits) + site.place_bytes if site.owner == site.name else 0

    def costs(self, genome: Genome) -> Costs:
        """Counts one policy."""
        at = (np.arange(len(genome)), genome[:, 0], genome[:, 1])
        weight_bytes = float(self.weight_bytes[at].sum())
        size = weight_bytes + float(self.activation_bytes[at].sum()) + self.space.table.rest_bytes
        return Costs(
            weight_bits=weight_bytes * 8 / self.space.table.weights,
            size=round(size),
            bitops=float(self.bitops[at].sum()),
            energy_uj=float(self.energy[at].sum()),
            latency_ms=None if self.latency is None else float(self.latency[at].sum()) + self.latency_rest,
        )

    def layers(self, policy: HybridPolicy) -> list[LayerReport]:
        """Lists what each site costs under a policy."""
        return [
            LayerReport(
                name=site.name,
                kind=site.kind,
                shape=site.weight_shape,
                weight_bits=policy[site.name].weight,
                activation_bits=policy[site.name].activation,
                size=self.site_bytes(site, policy[site.name]),
                bitops=site.macs * policy[site.name].weight * policy[site.name].activation,
            )
            for site in self.space.table
        ]

    def resources(self, budget: Budget) -> list[Resource]:
        """Turns a budget into capacities over this space.

        Raises:
            BudgetError: No policy of the space meets a limit; says the smallest that can.
        """
        resources = []
        table = self.space.table
        if budget.weight_bits is not None:
            capacity = budget.weight_bits * table.weights / 8
            resources.append(Resource("weight_bits", self.weight_bytes, capacity))
        sizes = [] if budget.size is None else [("size", budget.size)]
        if budget.size_fraction is not None:
            sizes.append(("size_fraction", budget.size_fraction * table.float_bytes))
        for name, size in sizes:
            cost = self.weight_bytes + self.activation_bytes
            rest = float(table.rest_bytes)
            resources.append(Resource(name, cost, size - rest, rest))
        if budget.bitops is not None:
            resources.append(Resource("bitops", self.bitops, budget.bitops))
        if budget.energy_uj is not None:
            resources.append(Resource("energy_uj", self.energy, budget.energy_uj))
        if budget.latency_ms is not None:
            if self.latency is None:
                raise BudgetError(f"Budget {budget} needs a profile of a machine: see hq_plugin.profiles.")
            rest = self.latency_rest
            resources.append(Resource("latency_ms", self.latency, budget.latency_ms - rest, rest))
        for resource in resources:
            smallest = float(resource.cost.min(axis=(1, 2)).sum())
            if smallest > resource.capacity:
                raise BudgetError(self._cannot_be_met(budget, resource, smallest))
        return resources

    def _cannot_be_met(self, budget: Budget, resource: Resource, smallest: float) -> str:
        table = self.space.table
        if resource.name == "weight_bits":
            bits = smallest * 8 / table.weights
            what, ask = f"{bits:.3f} effective bits", f'"{_up(bits)}bit"'
        elif resource.name == "bitops":
            what = f"{format_count(smallest)}BitOps"
            ask = f"Budget(bitops={np.ceil(smallest):.0f})"
        elif resource.name == "energy_uj":
            what, ask = f"{smallest:.4g} microjoules", f"Budget(energy_uj={smallest * 1.01:.4g})"
        elif resource.name == "latency_ms":
            total = smallest + resource.base
            what = f"{total:.3g} ms ({resource.base:.3g} of them in what stays float)"
            ask = f'"{total * 1.02:.3g}ms"'
        else:
            total = smallest + resource.base
            stays = f"{format_bytes(resource.base)} of them stay float"
            what = f"{format_bytes(total)} ({total / table.float_bytes:.1%} of the float model; {stays})"
            ask = f'"{np.ceil(total):.0f}B"'
        if resource.name == "latency_ms":
            return (
                f"Budget {budget} cannot be met: the fastest policy of this search space takes {what}. Ask for "
                f"{ask}, or choose another target."
            )
        least = min(self.space.weight_bits)
        lower = (
            [f"{least - 1}-bit weights (weight_bits=...)"] if least > 1 and self._helps(resource, smallest) else []
        )
        if resource.name == "bitops" and min(self.space.activation_bits) > 2:
            lower.append(f"activations below {min(self.space.activation_bits)} bits (activation_bits=...)")
        hint = f" or allow {' or '.join(lower)}" if lower else ""
        return (
            f"Budget {budget} cannot be met: the smallest policy of this search space has {what}. "
            f"Ask for {ask}{hint}.{self._held_up()}"
        )

    def _helps(self, resource: Resource, smallest: float) -> bool:
        """Whether weights that are one bit narrower would meet a limit, of what is not kept wide."""
        if resource.name not in ("weight_bits", "size"):
            return True
        least = min(self.space.weight_bits)
        free = [group for group in self.space.groups if min(group.weight_bits) == least]
        weights = sum(site.numel for group in free for site in group.sites if site.owner == site.name)
        return smallest - weights / 8 <= resource.capacity

    def _held_up(self) -> str:
        """Says which groups may not be as narrow as others."""
        least = min(self.space.weight_bits)
        wide = [
            f"{group.name} has {min(group.weight_bits)}"
            for group in self.space.groups
            if min(group.weight_bits) > least
        ]
        if not wide:
            return ""
        more = f" and {len(wide) - 3} more" if len(wide) > 3 else ""
        named = f"{', '.join(wide[:3])}{more} bits at least"
        return f" Not as narrow as others may be: {named} (pinned=..., weight_bits=...)."


def _up(bits: float) -> str:
    return f"{np.ceil(bits * 100) / 100:g}"
