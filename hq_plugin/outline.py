"""What a session knows without its model: the search space, costs, sensitivities and scores, as JSON and back.

Enough to predict and to plan policies, which is what `hq_plugin.explore` does; not enough to train or measure one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hq_plugin.cost import CostTable, Table
from hq_plugin.sites import FloatLayer, Site, SiteTable
from hq_plugin.space import Genome, Group, SearchSpace
from hq_plugin.untrusted import check_types, clean_errors

if TYPE_CHECKING:
    from hq_plugin.session import Session


@dataclass(frozen=True)
class Outline:
    """A session without its model.

    Attributes:
        model: Name of the float model.
        distance: What sensitivities and scores are.
        space: The search space.
        costs: What its policies cost, with latency where it was known.
        sensitivities: `[groups, weight widths, activation widths]`, what each width costs alone.
        scored: Genomes that searches of the session scored, and their scores.
        source: Arguments of the command line that give the float model and its data; empty where none did.
        finetune_steps: Steps of fine-tuning that are to follow.
        second_order: The same to second order, where it counts beside that.
        target: What it is for; empty where an earlier version saved it.
    """

    model: str
    distance: str
    space: SearchSpace
    costs: CostTable
    sensitivities: Table
    scored: tuple[tuple[Genome, float], ...]
    source: tuple[str, ...]
    finetune_steps: int = 0
    second_order: Table | None = None
    target: str = ""


def write_outline(session: Session, model: str, distance: str) -> dict[str, Any]:
    """Returns the outline of a session as JSON values; `read_outline` also needs its sensitivities."""
    space, costs = session.space, session.costs
    known: dict[str, float] = {}
    for scored in session.scored:
        if np.isfinite(scored.score):
            known[_digits(scored.genome)] = scored.score
    return {
        "model": model,
        "distance": distance,
        "source": list(session.source),
        "target": session.config.target,
        "finetune_steps": session.config.steps.finetune,
        "sites": [asdict(site) for site in space.table],
        "float_layers": [asdict(layer) for layer in space.table.float_layers],
        "float_bytes": space.table.float_bytes,
        "rest_bytes": space.table.rest_bytes,
        "groups": [
            {
                "name": group.name,
                "weight_bits": group.weight_bits,
                "activation_bits": group.activation_bits,
                "group_sizes": group.group_sizes,
                "dynamic": group.dynamic,
            }
            for group in space.groups
        ],
        "latency": None
        if costs.latency is None
        else {"table": write_table(costs.latency), "rest": costs.latency_rest, "batch": costs.latency_batch},
        "scored": known,
    }


def read_outline(content: Mapping[str, Any], sensitivities: Any, second_order: Any = None) -> Outline:
    """Reads what `write_outline` wrote.

    Args:
        content: The outline.
        sensitivities: The session's, as `write_table` wrote them.
        second_order: The session's, where it has one.

    Raises:
        ArtifactError: It is damaged.
    """
    with clean_errors("The session's outline"):
        sites = tuple(Site(**{**site, "weight_shape": tuple(site["weight_shape"])}) for site in content["sites"])
        left = tuple(FloatLayer(**layer) for layer in content["float_layers"])
        for part in (*sites, *left):
            check_types(part)
        table = SiteTable(sites, left, int(content["float_bytes"]), int(content["rest_bytes"]))
        members = table.groups
        groups = tuple(
            Group(
                group["name"],
                tuple(members[group["name"]]),
                tuple(group["weight_bits"]),
                tuple(group["activation_bits"]),
                tuple(int(size) for size in group["group_sizes"]),
                bool(group.get("dynamic", False)),
            )
            for group in content["groups"]
        )
        if [group.name for group in groups] != list(members):
            raise ValueError("choices for other groups of layers")
        space = SearchSpace(table, groups)
        costs = CostTable(space)
        losses = read_table(sensitivities)
        if losses.shape != costs.weight_bytes.shape:
            raise ValueError("sensitivities of another search space")
        latency = content["latency"]
        if latency is not None:
            costs.latency = read_table(latency["table"])
            costs.latency_rest, costs.latency_batch = float(latency["rest"]), int(latency["batch"])
            if costs.latency.shape != losses.shape:
                raise ValueError("latency of another search space")
        scored = tuple((_genome(digits, space), float(score)) for digits, score in content["scored"].items())
        texts = str(content["model"]), str(content["distance"])
        source, steps = tuple(map(str, content["source"])), int(content.get("finetune_steps", 0))
        if steps < 0:
            raise ValueError("a negative number of steps")
        curved = read_second_order(second_order, losses)
        return Outline(*texts, space, costs, losses, scored, source, steps, curved, str(content.get("target", "")))


def read_second_order(table: Any, sensitivities: Table) -> Table | None:
    """Returns what `write_table` wrote of the second order of losses, or None where there is none.

    Raises:
        ValueError: It is of another search space than the sensitivities.
    """
    if table is None:
        return None
    found = read_table(table)
    if found.shape != sensitivities.shape:
        raise ValueError("the second order of another search space")
    return found


def write_table(table: Table) -> list[list[list[float | None]]]:
    """Returns a table as JSON values; what is infinite, where there is no choice, becomes None."""
    return [[[value if np.isfinite(value) else None for value in row] for row in group] for group in table.tolist()]


def read_table(values: Any) -> Table:
    """Reads what `write_table` wrote."""
    table = np.array(values, dtype=float)  # None becomes NaN
    return np.where(np.isfinite(table), table, np.inf)


def _digits(genome: Genome) -> str:
    """Writes a genome as one digit an index: there are at most eight widths."""
    return "".join(map(str, genome.reshape(-1).tolist()))


def _genome(digits: str, space: SearchSpace) -> Genome:
    genome = np.array([int(digit) for digit in digits], dtype=np.int64).reshape(space.shape)
    if not bool((genome <= space.top).all()):
        raise ValueError("a scored policy of another search space")
    return genome


__all__ = ["Outline", "read_outline", "read_table", "write_outline", "write_table"]
