"""HAQ: a reinforcement-learning agent goes over the layers and gives each a width (Wang et al., arXiv:1811.08886).

States are the layer's features, as in section 3.1 there: its index, kind, channels, kernel, input, weights,
multiply-accumulates, whether the width is that of weights or of activations, and the last action. A policy that
is over the budget has its widths taken down one after the other, from the last layer on, until it is not. The
reward is that of a policy's distance to the float model, its negative logarithm; HAQ's is the accuracy, which on
as few samples hardly tells policies apart. HAQ trains each candidate for an epoch before it is scored; here it is
scored as hq_plugin's search scores, without training, so that both have the same.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hq_plugin.cost import Resource
from hq_plugin.policy import HybridPolicy
from hq_plugin.space import Genome, Group, SearchSpace
from tests.benchmarks.matrix.budget_moves import keeps
from tests.benchmarks.matrix.ddpg import Agent

#: Scores policies; the lower the better.
OneScore = Callable[[HybridPolicy], float]
EPISODES = 300
#: Share of the episodes whose actions are random, at most HAQ's 20.
WARMUP_SHARE, WARMUP = 0.2, 20


@dataclass
class Learned:
    """What the agent found.

    Attributes:
        genome: The best genome.
        score: Its score.
        scored: Policies scored: one an episode, those seen before not again.
        curve: `[policies scored, seconds, best score so far]` after each episode.
    """

    genome: Genome
    score: float = float("inf")
    scored: int = 0
    curve: list[list[float]] = field(default_factory=list)


def pulled_back(genome: Genome, resources: Sequence[Resource]) -> Genome:
    """Takes widths down, one layer after the other from the last on, until every limit is kept."""
    genome = genome.copy()
    while not keeps(genome, resources):
        if not genome.any():
            break
        for row, column in reversed(list(np.ndindex(*genome.shape))):
            if genome[row, column] > 0:
                genome[row, column] -= 1
                if keeps(genome, resources):
                    break
    return genome


def places(space: SearchSpace) -> list[tuple[int, int]]:
    """Returns the places of a genome that have a choice, in the order in which the agent decides them."""
    return [(row, column) for row, column in np.ndindex(*space.top.shape) if space.top[row, column] > 0]


def layer_features(space: SearchSpace) -> NDArray[np.float32]:
    """Returns the features of each place, `[places, features]`, scaled to 0 to 1; without the last action."""
    raw = [[row, *_of_group(space.groups[row]), column] for row, column in places(space)]
    table = np.array(raw, dtype=np.float32)
    low, high = table.min(axis=0), table.max(axis=0)
    scaled: NDArray[np.float32] = (table - low) / np.maximum(high - low, 1e-6)
    return scaled.astype(np.float32)


def _of_group(group: Group) -> list[float]:
    site = group.sites[0]
    shape = site.weight_shape
    kernel = math.prod(shape[2:])
    depthwise = len(shape) > 2 and shape[1] == 1 and shape[0] > 1
    numel, macs = sum(s.numel for s in group.sites), sum(s.macs for s in group.sites)
    return [
        float(depthwise),
        float(site.kind == "linear"),
        *(math.log1p(value) for value in (shape[0], shape[1], kernel, site.input_numel, numel, macs)),
    ]


def learn(
    space: SearchSpace,
    resources: Sequence[Resource],
    score: OneScore,
    episodes: int,
    seed: int,
    enough: float = -math.inf,
) -> Learned:
    """Lets an agent learn to give widths.

    Args:
        space: The search space.
        resources: The limits.
        score: Scores a policy.
        episodes: How many policies the agent tries.
        seed: Of what is random.
        enough: Stop once a policy scores this or less.
    """
    began = time.perf_counter()
    features, order = layer_features(space), places(space)
    agent = Agent(features.shape[1] + 1, len(order), min(WARMUP, max(1, int(WARMUP_SHARE * episodes))), seed)
    known: dict[bytes, float] = {}
    found = Learned(pulled_back(np.zeros_like(space.top), resources))
    for _ in range(episodes):
        genome, last = space.top.copy(), 1.0
        states, actions = [], []
        for (row, column), layer in zip(order, features, strict=True):
            state = np.append(layer, np.float32(last)).astype(np.float32)
            last = agent.act(state)
            # Equal shares of [0, 1] to the widths, as in equation 2 of the paper.
            genome[row, column] = min(int(last * (space.top[row, column] + 1)), space.top[row, column])
            states.append(state)
            actions.append(last)
        genome = pulled_back(genome, resources)
        # The agent learns from the widths that were really given and scored, not from those that it asked for.
        for number, (row, column) in enumerate(order):
            actions[number] = (genome[row, column] + 0.5) / (space.top[row, column] + 1)
        name = genome.tobytes()
        if name not in known:
            known[name] = score(space.policy(genome))
            found.scored += 1
        value = known[name]
        if value < found.score:
            found.genome, found.score = genome, value
        found.curve.append([found.scored, round(time.perf_counter() - began, 2), found.score])
        if found.score <= enough:
            break
        agent.learn(states, actions, -math.log(max(min(value, 1e6), 1e-9)))
    return found
