"""`Found`: what a search decided for a budget."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hq_plugin.budget import Budget
from hq_plugin.policy import HybridPolicy
from hq_plugin.result import Baseline, Costs


@dataclass(frozen=True)
class Found:
    """What a search decided for a budget.

    Attributes:
        policy: The best policy.
        chosen: `"searched"`, or the baseline that was better: `"uniform"` or `"dynamic_programming"`.
        costs: What it costs.
        used: Share of each limit that it uses.
        baselines: Uniform, dynamic-programming and searched policy, each with its held-out distance.
        history: One `{"evaluation", "policy", "score"}` and the fields of `Costs` for every policy scored.
        seconds: Wall time of the search; of that, in the genetic search's scoring, outside it
            (`search_overhead`), and in ranking the best again on more data (`search_reranking`).
        memory: Most bytes in use so far at the end of the search.
        front: What additive sensitivities predict to be best over the budget's first limit.
        budget: What was searched under; None where the policy was given.
    """

    policy: HybridPolicy
    chosen: str
    costs: Costs
    used: dict[str, float]
    baselines: dict[str, Baseline]
    history: list[dict[str, Any]]
    seconds: dict[str, float]
    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    front: list[dict[str, Any]] = field(default_factory=list)
    budget: Budget | None = None
