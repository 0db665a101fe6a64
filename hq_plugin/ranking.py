"""Ranks policies by their distance on held-out data: over processes, past what a checkpoint knows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from torch import nn

from hq_plugin.checkpoint import Checkpoint
from hq_plugin.cost import CostTable
from hq_plugin.distribution import map_split
from hq_plugin.interruption import interrupted
from hq_plugin.lasting import LastingLosses
from hq_plugin.policy import HybridPolicy
from hq_plugin.result import Baseline
from hq_plugin.scoring import Scorer
from hq_plugin.search import Scored
from hq_plugin.sharding import sharded
from hq_plugin.space import Genome


def distances(
    scorer: Scorer,
    network: nn.Module,
    policies: Sequence[HybridPolicy],
    samples: int,
    stage: str,
    checkpoint: Checkpoint | None = None,
    of: str = "",
) -> list[float]:
    """Scores policies, split over processes where there are several; what a checkpoint knows is read.

    Args:
        scorer: Measures one policy.
        network: The prepared network.
        policies: What to score.
        samples: Held-out samples for each.
        stage: Under which scores are kept in the checkpoint.
        checkpoint: Where scores are kept; None keeps none.
        of: By what the network is known there, where it may have been trained by other code than ours.
    """
    names = [json.dumps([f"{stage}{of}", samples, policy.to_json()]) for policy in policies]
    known = {name: None if checkpoint is None else checkpoint.score(name) for name in names}
    new = [(name, policy) for name, policy in zip(names, policies, strict=True) if known[name] is None]

    scored: dict[str, float] = {}

    def distance(item: tuple[str, HybridPolicy]) -> float:
        scored[item[0]] = scorer.score(network, item[1], samples=samples).distance
        return scored[item[0]]

    try:
        found = dict(zip([name for name, _ in new], map_split(distance, new, evenly=sharded()), strict=True))
    except KeyboardInterrupt:
        if checkpoint is not None:
            checkpoint.add_scores(scored)
        raise interrupted(stage, None if checkpoint is None else checkpoint.directory) from None
    if checkpoint is not None:
        checkpoint.add_scores(found)
    return [found[name] if name in found else float(known[name] or 0.0) for name in names]


def rerank(
    scorer: Scorer,
    network: nn.Module,
    costs: CostTable,
    losses: LastingLosses,
    leaders: Sequence[Scored],
    seeds: Mapping[str, list[Genome]],
) -> dict[str, Baseline]:
    """Measures the leaders of a search and its baselines on all held-out data; keeps the best of each kind.

    Where there are several processes, each measures some and all are told, so that they agree to the last bit.

    Args:
        scorer: Measures one policy.
        network: The prepared network.
        costs: What policies cost.
        losses: What they add to a distance counts as well.
        leaders: The best policies of the search.
        seeds: Baselines by name: `"uniform"`, `"dynamic_programming"`.
    """
    best: dict[str, Baseline] = {}
    lowest: dict[str, float] = {}
    candidates = {**seeds, "searched": [scored.genome for scored in leaders]}
    distinct = {genome.tobytes(): genome for genomes in candidates.values() for genome in genomes}

    def measure(genome: Genome) -> tuple[float, float | None]:
        fidelity = scorer.score(network, costs.space.policy(genome))
        return fidelity.distance, fidelity.accuracy

    measured = dict(zip(distinct, map_split(measure, list(distinct.values()), evenly=sharded()), strict=True))
    for name, genomes in candidates.items():
        for genome in genomes:
            distance, accuracy = measured[genome.tobytes()]
            lasts = distance + losses.added(genome)
            if name not in best or lasts < lowest[name]:
                lowest[name] = lasts
                policy = costs.space.policy(genome)
                best[name] = Baseline(name, policy, costs.costs(genome), distance, accuracy)
    # Where the search found a baseline again, the name says so.
    order = ["searched", "dynamic_programming", "uniform"]
    return {name: best[name] for name in order if name in best}
