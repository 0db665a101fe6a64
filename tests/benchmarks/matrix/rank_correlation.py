"""Kendall's tau between what predicts a policy's quality and its distance to the float model after fine-tuning.

Policies are drawn in two pools: `across` budgets from 2.1 to 5 bits, where any predictor that counts bits does
well, and `within` one budget, all of the same bytes, which is the hard one and what a search has to do. In both,
every second policy is random and the others are mutations of the plan of additive sensitivities, as the search's
are. All predictors are compared on the same policies and the same fine-tuning, as hq_plugin does it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import kendalltau

from hq_plugin import Budget, HybridPolicy
from hq_plugin.allocation import dynamic_programming, monotone
from hq_plugin.cost import Table
from hq_plugin.repair import Repair, moved
from hq_plugin.scoring import evaluating
from hq_plugin.session import Session
from hq_plugin.space import Genome
from tests.benchmarks.matrix.allocators import Problem
from tests.benchmarks.matrix.budget_moves import random_genome
from tests.benchmarks.matrix.rows import Row

POOLS = ("across", "within")
#: Policies of a pool, and their steps of fine-tuning.
POLICIES, TAU_STEPS = 32, 100
#: Bits between which budgets of the pool `across` are drawn.
LOWEST, HIGHEST = 2.1, 5.0
#: Mutations between the plan and a policy near it, and how many are tried where they lead back to the plan.
MUTATIONS, MOST_MUTATIONS = 3, 30
PREDICTORS = {
    "search": "what the search minimises: that score, and what lasts of the second order",
    "metaquantnet": "score under the MetaQuantNet",
    "rounded": "score of the rounded float network",
    "sensitivities": "sum of additive sensitivities",
    "hawq": "sum of HAWQ-V2's traces times errors",
}


def draw(problem: Problem, pool: str, number: int, budget: str) -> tuple[HybridPolicy, str, str]:
    """Draws a policy.

    Args:
        problem: The model and its additive sensitivities.
        pool: Of `POOLS`.
        number: Of the policy in its pool; it decides what is drawn.
        budget: The budget of the pool `within`.

    Returns:
        The policy, how it was drawn, and its budget.
    """
    session = problem.session
    rng = np.random.RandomState(10_000 * (1 + POOLS.index(pool)) + number)
    if pool == "across":
        smallest = session.costs.weight_bytes.min(axis=(1, 2)).sum() * 8 / session.space.table.weights
        budget = f"{max(rng.uniform(LOWEST, HIGHEST), smallest + 0.02):.3f}bit"
    resources = session.costs.resources(Budget.parse(budget))
    if number % 2:
        return session.space.policy(random_genome(session.space, resources, rng)), "random", budget
    losses = monotone(session.sensitivities)
    repair = Repair(losses, resources, session.space.top, rng)
    plan: Genome = dynamic_programming(losses, resources)
    near, moves = plan, 0
    # The repair may undo what a mutation did: a pool full of the plan itself would rank nothing.
    while moves < MUTATIONS or (np.array_equal(near, plan) and moves < MOST_MUTATIONS):
        near, moves = repair(moved(near, session.space.top, rng)), moves + 1
    return session.space.policy(near), "near the plan", budget


def summed(losses: Table, genome: Genome) -> float:
    """Returns the sum of additive losses of a genome."""
    return float(losses[np.arange(len(genome)), genome[:, 0], genome[:, 1]].sum())


def measure(problem: Problem, trained: Session, pool: str, number: int, budget: str, finetune: int) -> Row:
    """Predicts and measures one policy."""
    policy, drawn, asked = draw(problem, pool, number, budget)
    session, genome = problem.session, problem.session.space.genome(policy)
    losses, _ = problem.hawq()
    with evaluating(session.network):
        rounded = problem.score(policy)
    with evaluating(trained.network):
        generated = trained.scorer.score(trained.network, policy, samples=trained.scorer.samples).distance
    packed = trained.finetune(policy, steps=finetune)
    return {
        "drawn": drawn,
        "drawn_budget": asked,
        "predictors": {
            "search": generated + trained.losses.added(genome),
            "metaquantnet": generated,
            "rounded": rounded,
            "sensitivities": summed(session.sensitivities, genome),
            "hawq": summed(losses, genome),
        },
        "policy": policy.to_json(),
        **problem.task.measure(packed),
    }


def taus(rows: Sequence[Row]) -> dict[str, float]:
    """Returns Kendall's tau of each predictor over the rows of one pool."""
    good = [row for row in rows if "error" not in row]
    found = [row["distance"] for row in good]
    return {
        name: float(kendalltau([row["predictors"][name] for row in good], found).statistic) for name in PREDICTORS
    }
