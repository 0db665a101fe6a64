"""What the page of `hq-plugin explore` asks, and the answers as JSON values: the page computes nothing itself."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hq_plugin.explore.planner import Pins, Planner, Prediction
from hq_plugin.outline import Outline
from hq_plugin.report.document import AXES
from hq_plugin.space import Genome


class Answers:
    """Answers for one session.

    Args:
        outline: What is known of it.
        directory: Where it is saved, for commands.
    """

    def __init__(self, outline: Outline, directory: str | Path) -> None:
        self.planner, self.outline, self.directory = Planner(outline), outline, str(directory)
        self._kept: tuple[object, list[Prediction]] | None = None

    def data(self) -> dict[str, Any]:
        """Returns what the page shows first: the session, its layers and what was measured."""
        planner, outline, space = self.planner, self.outline, self.outline.space
        sizes = planner.costs
        groups = []
        for g, group in enumerate(space.groups):
            widest = (len(group.weight_bits) - 1, len(group.activation_bits) - 1)
            losses = outline.sensitivities[g]
            groups.append(
                {
                    "name": group.name,
                    "sites": [site.name for site in group.sites],
                    "shape": list(group.sites[0].weight_shape),
                    "kind": group.sites[0].kind,
                    "weights": sum(site.numel for site in group.sites if site.owner == site.name),
                    "weight_bits": list(group.weight_bits),
                    "activation_bits": list(group.activation_bits),
                    "bytes": sizes.weight_bytes[g, : widest[0] + 1, widest[1]].tolist(),
                    "rises": losses[: widest[0] + 1, widest[1]].tolist(),
                }
            )
        scored = [
            {**_costs(planner.predict(genome)), "score": score} for genome, score in outline.scored if score > 0
        ]
        return {
            "model": outline.model,
            "distance": outline.distance,
            "directory": self.directory,
            "float_size": space.table.float_bytes,
            "axes": [{"name": axis, "label": AXES[axis]} for axis in planner.axes],
            "latency_batch": planner.costs.latency_batch,
            "groups": groups,
            "calibrated_on": planner.calibration.policies,
            "scored": scored,
            "command": self.command(),
            "model_is_known": bool(outline.source),
        }

    def plan(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """Plans a policy.

        Args:
            question: `"axis"`, the cost that is limited; `"limit"`, or None for the middle of the front; `"pins"`,
                group to `[weight bits or None, activation bits or None]`; `"front"`, whether to answer with the
                front for these pins, too.

        Returns:
            `"limit"`, raised to what the pins allow at least; `"widths"`, for each group; `"policy"`, a
            `HybridPolicy` as JSON; what it costs and how close it is expected to come; `"front"` where asked for.

        Raises:
            ConfigError: There is no such cost, group or width.
        """
        axis, planner = str(question["axis"]), self.planner
        pins: Pins = {
            str(name): (_width(pinned[0]), _width(pinned[1])) for name, pinned in question.get("pins", {}).items()
        }
        front = self._front_of(axis, pins)
        least, most = (float(front[end].costs[axis]) for end in (0, -1))
        limit = question.get("limit")
        asked = front[len(front) // 3].costs[axis] if limit is None else float(limit)
        limit = max(min(asked, most), least)
        plan = planner.plan(axis, limit, pins)
        space = planner.space
        answer = {
            "limit": limit,
            "raised": asked < least * (1 - 1e-9),
            "least": least,
            "most": most,
            "widths": _widths(space.groups, plan.genome),
            "policy": space.policy(plan.genome).to_json(),
            **_costs(plan),
        }
        if question.get("front"):
            answer["front"] = [_costs(point) for point in front]
        return answer

    def _front_of(self, axis: str, pins: Pins) -> list[Prediction]:
        """Returns a front, the last one from memory: while a limit is dragged it stays the same."""
        key = (axis, tuple(sorted(pins.items())))
        kept = self._kept
        if kept is None or kept[0] != key:
            kept = self._kept = (key, self.planner.front(axis, pins))
        return kept[1]

    def command(self) -> str:
        """Returns the command that makes a policy that was downloaded; MODEL and DATA where they are not known."""
        source = self.outline.source or ("MODEL", "--data", "DATA")
        words = ["hq-plugin", "quantize", *source, "--session", self.directory, "--policy", "policy.json"]
        return shlex.join([*words, "--out", "small"])


def _costs(prediction: Prediction) -> dict[str, Any]:
    return {**prediction.costs, "predicted": prediction.predicted, "expected": prediction.expected}


def _widths(groups: Any, genome: Genome) -> list[list[int]]:
    return [
        [group.weight_bits[weight], group.activation_bits[activation]]
        for group, (weight, activation) in zip(groups, genome.tolist(), strict=True)
    ]


def _width(value: Any) -> int | None:
    return None if value is None else int(value)
