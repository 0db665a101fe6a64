"""Genomes on a small problem: 6 groups, 4 widths, and a limit that half of the widest policy meets."""

import numpy as np

from hq_plugin.cost import Resource
from hq_plugin.evolution import PolicyGenome, evolution
from hq_plugin.repair import Repair
from hq_plugin.space import Genome

GROUPS, WIDTHS = 6, 4


def repair_of(rng: np.random.RandomState) -> Repair:
    cost = np.broadcast_to(np.arange(1.0, WIDTHS + 1)[None, :, None], (GROUPS, WIDTHS, 1))
    top = np.stack([np.full(GROUPS, WIDTHS - 1), np.zeros(GROUPS, dtype=int)], 1)
    return Repair(1 / cost, [Resource("weight_bits", cost, capacity=GROUPS * 2.5)], top, rng)


def spent(genome: Genome) -> int:
    return int((genome[:, 0] + 1).sum())


def test_mutation_keeps_the_budget_and_avoids_what_was_scored() -> None:
    rng = np.random.RandomState(0)
    repair, known = repair_of(rng), set[bytes]()
    start = repair(repair.top)
    genome = PolicyGenome(start, repair, known)
    genome.random_state = rng
    for _ in range(30):
        child = genome.spawn_child()
        child.mutate()
        assert spent(child.genome) <= GROUPS * 2.5
        known.add(child.key)
    assert len(known) > 20, "few of the mutants are alike"
    assert np.array_equal(genome.genome, start), "a parent stays as it is"


def test_crossover_takes_each_group_from_a_parent() -> None:
    rng = np.random.RandomState(0)
    repair = repair_of(rng)

    def individual(widths: list[int]) -> PolicyGenome:
        genome = PolicyGenome(np.stack([widths, [0] * GROUPS], 1), repair, ())
        genome.random_state = rng
        return genome

    mother, father = individual([3, 0, 3, 0, 3, 0]), individual([0, 3, 0, 3, 0, 3])
    inherited = 0
    for _ in range(20):
        child = mother.spawn_child()
        child.recombine(father)
        assert spent(child.genome) <= GROUPS * 2.5
        inherited += int(np.isin(child.genome[:, 0], (0, 3)).sum())
    assert inherited > 0.6 * 20 * GROUPS, "repair changes a few groups, not all"


def test_a_strategy_starts_from_what_was_suggested() -> None:
    rng = np.random.RandomState(0)
    repair = repair_of(rng)
    start = repair(repair.top)
    strategy = evolution(start, repair, (), rng, population=4, crossover=0.5, evaluations=20)
    strategy.suggest(start.astype(float))
    first = strategy.ask()
    assert np.array_equal(first.genome, start)
    strategy.tell(first, 1.0)
