"""Plans and predicts policies on a saved session, without its model: what the page of `hq-plugin explore` asks.

A plan is the exact dynamic program of additive sensitivities under one limit, with some groups pinned to a width.
Nothing is run: what a policy costs is counted, how close it comes is predicted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hq_plugin.allocation import dynamic_programming
from hq_plugin.cost import Resource, Table
from hq_plugin.errors import BudgetError, ConfigError
from hq_plugin.explore.calibration import Calibration
from hq_plugin.findings import predicted_loss
from hq_plugin.front import convex_front
from hq_plugin.lasting import LastingLosses
from hq_plugin.outline import Outline
from hq_plugin.space import Genome

#: Costs that can be traded for closeness, in the order in which they are offered.
AXES = ("weight_bits", "size", "bitops", "energy_uj", "latency_ms")
#: Points of a front on the page.
POINTS = 80

#: Group to a width for its weights and one for its inputs; None leaves it free.
Pins = Mapping[str, tuple[int | None, int | None]]


@dataclass(frozen=True)
class Prediction:
    """What is known of a policy before it is made.

    Attributes:
        genome: The policy in the space's encoding.
        costs: The fields of `hq_plugin.result.Costs`.
        predicted: The sum of its sensitivities.
        expected: That, calibrated to what was measured; before fine-tuning.
    """

    genome: Genome
    costs: dict[str, Any]
    predicted: float
    expected: float


class Planner:
    """Plans on the outline of a session.

    Args:
        outline: What is known of the session.

    Attributes:
        axes: The costs that can be limited here; latency only where it is known.
        calibration: From predicted to measured distances.
    """

    def __init__(self, outline: Outline) -> None:
        self.outline, self.space, self.costs = outline, outline.space, outline.costs
        self.axes = [axis for axis in AXES if axis != "latency_ms" or self.costs.latency is not None]
        losses = LastingLosses(self.space, outline.sensitivities, outline.finetune_steps, outline.second_order)
        self._losses, self._plain = losses.table, losses.plain
        predicted = [predicted_loss(self._plain, genome) for genome, _ in outline.scored]
        self.calibration = Calibration(predicted, [score for _, score in outline.scored])

    def predict(self, genome: Genome) -> Prediction:
        """Counts what a policy costs, and predicts how close it comes."""
        predicted = predicted_loss(self._plain, genome)
        return Prediction(genome, asdict(self.costs.costs(genome)), predicted, self.calibration(predicted))

    def front(self, axis: str, pins: Pins) -> list[Prediction]:
        """Returns policies from the cheapest to the closest along one cost.

        Raises:
            ConfigError: There is no such cost, group or width.
        """
        allowed = self._allowed(pins)
        cost = np.where(allowed, self._cost(axis)[0], np.inf)
        return [self.predict(genome) for genome in convex_front(self._losses, cost, POINTS)]

    def plan(self, axis: str, limit: float, pins: Pins) -> Prediction:
        """Plans the policy that is predicted to be closest under a limit.

        Args:
            axis: One of `axes`.
            limit: What the policy may cost, in the unit of `hq_plugin.result.Costs`.
            pins: Groups that are fixed.

        Raises:
            BudgetError: No policy with these pins keeps the limit; says the smallest that does.
            ConfigError: There is no such cost, group or width.
        """
        table, unit, base = self._cost(axis)
        table = np.where(self._allowed(pins), table, np.inf)
        # Costs that are whole bytes add up exactly; a limit that was read off one of them must include it.
        capacity = (limit * (1 + 1e-9) - base) / unit
        smallest = float(table.min(axis=(1, 2)).sum())
        if not smallest <= capacity:
            least = smallest * unit + base
            raise BudgetError(f"No policy with these pins has {axis} of {limit:g}: the smallest has {least:.6g}.")
        return self.predict(dynamic_programming(self._losses, [Resource(axis, table, capacity)]))

    def _cost(self, axis: str) -> tuple[Table, float, float]:
        """Returns an additive cost, and the factor and the constant that make it a field of `Costs`."""
        costs, table = self.costs, self.space.table
        if axis == "weight_bits":
            return costs.weight_bytes, 8 / table.weights, 0.0
        if axis == "size":
            return costs.weight_bytes + costs.activation_bytes, 1.0, float(table.rest_bytes)
        if axis == "bitops":
            return costs.bitops, 1.0, 0.0
        if axis == "energy_uj":
            return costs.energy, 1.0, 0.0
        if axis == "latency_ms" and costs.latency is not None:
            return costs.latency, 1.0, costs.latency_rest
        raise ConfigError(f"There is no cost {axis!r} here. Possible are {', '.join(self.axes)}.")

    def _allowed(self, pins: Pins) -> Any:
        """Returns which choices the pins leave, `[groups, weight widths, activation widths]`."""
        allowed = np.isfinite(self.costs.weight_bytes)
        rows = {group.name: row for row, group in enumerate(self.space.groups)}
        for name, pinned in pins.items():
            if name not in rows:
                raise ConfigError(f"There is no group {name!r} in this session.")
            group = self.space.groups[rows[name]]
            for axis, (width, widths) in enumerate(
                zip(pinned, (group.weight_bits, group.activation_bits), strict=True)
            ):
                if width is None:
                    continue
                if width not in widths:
                    raise ConfigError(f"{name!r} cannot have {width} bits: this session has {widths} for it.")
                keep = np.zeros(allowed.shape[axis + 1], dtype=bool)
                keep[widths.index(width)] = True
                allowed[rows[name]] &= keep[:, None] if axis == 0 else keep[None, :]
        return allowed
