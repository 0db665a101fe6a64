from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import hq_plugin
from hq_plugin import Config
from hq_plugin.allocation import monotone
from hq_plugin.lasting import EMBEDDINGS, INPUTS, SECOND_ORDER, STEPS, LastingLosses, counts_second_order
from hq_plugin.session import Session


class Text(nn.Module):
    """An embedding, a table tied to the output, and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.marks = nn.Embedding(40, 16), nn.Embedding(12, 16)
        self.layer, self.head = nn.Linear(16, 16), nn.Linear(16, 12, bias=False)
        self.head.weight = self.marks.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.layer(self.words(tokens) + self.marks(tokens % 12)).relu().mean(1))
        return found


@pytest.fixture(scope="module")
def session() -> Session:
    torch.manual_seed(0)
    data = [torch.randint(0, 40, (8, 6)) for _ in range(6)]
    return hq_plugin.meta_train(
        Text(), data, effort="smoke", meta_steps=0, finetune_steps=STEPS, activation_bits=16, search_evaluations=12
    )


def rows(session: Session) -> dict[str, int]:
    return {site.name: row for row, group in enumerate(session.space.groups) for site in group.sites}


def test_what_is_only_looked_up_counts_more(session: Session) -> None:
    plain = np.maximum(monotone(session.sensitivities), 0)
    ratio = np.maximum(session.losses.table, 0)[:, 0, 0] / plain[:, 0, 0]
    found = {name: float(ratio[row]) for name, row in rows(session).items()}
    assert found == pytest.approx({"words": EMBEDDINGS, "marks": 1.0, "layer": 1.0, "head": 1.0}, rel=1e-3)


def test_without_training_nothing_is_added_and_with_few_steps_less(session: Session) -> None:
    narrow = np.zeros_like(session.space.top)
    added = [
        LastingLosses(session.space, session.sensitivities, steps).added(narrow)
        for steps in (0, STEPS // 4, STEPS, 10 * STEPS)
    ]
    assert added[0] == 0
    assert 0 < added[1] == pytest.approx(added[2] / 4)
    assert added[2] == added[3]


def test_the_plan_gives_embeddings_more_bits_where_training_follows(session: Session) -> None:
    def words(steps: int) -> float:
        session.config = session.config.with_options({"finetune_steps": steps})
        plans = [session.baselines(f"{bits}bit")["dynamic_programming"] for bits in np.arange(3.25, 7.0, 0.25)]
        return float(np.mean([plan["words"].weight for plan in plans]))

    assert words(0) < words(STEPS)


def test_the_search_weighs_what_lasts(session: Session) -> None:
    session.config = session.config.with_options({"finetune_steps": STEPS})
    found = session.search("4bit")
    losses = session.losses
    weighed = {
        name: baseline.kl + losses.added(session.space.genome(baseline.policy))
        for name, baseline in found.baselines.items()
    }
    assert found.chosen == min(weighed, key=lambda name: weighed[name])


def test_the_second_order_counts_beside_what_is_measured_where_training_follows(session: Session) -> None:
    plain = np.maximum(monotone(session.sensitivities), 0)
    second_order = np.where(np.isfinite(plain), 7.0 * plain[::-1], np.inf)  # the other way round
    narrow = np.zeros_like(session.space.top)
    alone, with_it = (
        LastingLosses(session.space, session.sensitivities, STEPS, curved).added(narrow)
        for curved in (None, second_order)
    )
    assert with_it - alone == pytest.approx(SECOND_ORDER * plain[:, 0, 0].sum())
    assert LastingLosses(session.space, session.sensitivities, 0, second_order).added(narrow) == 0


def test_a_model_without_a_gradient_is_planned_by_what_is_measured() -> None:
    class Cut(Text):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return super().forward(tokens).detach()

    torch.manual_seed(0)
    data = [torch.randint(0, 40, (8, 6)) for _ in range(6)]
    options = {"meta_steps": 0, "finetune_steps": STEPS, "activation_bits": 16, "search_evaluations": 12}
    with pytest.warns(hq_plugin.HQWarning, match="second order of the loss is not known"):
        session = hq_plugin.meta_train(Cut(), data, effort="fast", progress=False, **options)
    assert session.second_order is None


def test_planned_losses_fall_with_each_width_whatever_the_second_order_does(session: Session) -> None:
    second_order = np.random.RandomState(0).rand(*session.sensitivities.shape)
    second_order[0] = np.nan
    table = LastingLosses(session.space, session.sensitivities, STEPS, second_order).table
    assert not np.isnan(table).any()
    for row, (top, _) in enumerate(session.space.top):
        assert (np.diff(table[row, : top + 1, 0]) <= 1e-12).all()


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        ({}, True),
        ({"activation_bits": (4, 8)}, True),
        ({"sensitivities": "measured"}, False),
        ({"finetune_steps": 0}, False),
        ({"effort": "smoke"}, False),
    ],
)
def test_the_second_order_counts_where_training_follows(options: dict[str, Any], counts: bool) -> None:
    assert counts_second_order(Config(**{"effort": "fast", **options}).filled()) is counts


def test_of_the_second_order_inputs_count_more(trained: nn.Module, batches) -> None:  # type: ignore[no-untyped-def]
    session = hq_plugin.meta_train(
        trained, batches, effort="smoke", meta_steps=0, finetune_steps=STEPS, activation_bits=(4, 8)
    )
    top, rows = session.space.top, np.arange(len(session.space.top))
    curved = np.zeros_like(session.sensitivities)
    curved[rows, 0, :] += 1e-3
    curved[rows, :, 0] += 1e-3
    plain = LastingLosses(session.space, session.sensitivities, STEPS)
    weighed = LastingLosses(session.space, session.sensitivities, STEPS, curved)
    narrow_weights, narrow_inputs = top.copy(), top.copy()
    narrow_weights[:, 0], narrow_inputs[:, 1] = 0, 0
    of_weights, of_inputs = (weighed.added(g) - plain.added(g) for g in (narrow_weights, narrow_inputs))
    chooses = float((top[:, 1] > 0).mean())
    assert chooses > 0
    assert of_inputs == pytest.approx(INPUTS * of_weights * chooses, rel=0.01)


def test_the_second_order_counts_where_inputs_alone_choose(trained: nn.Module, batches) -> None:  # type: ignore[no-untyped-def]
    options = {"meta_steps": 0, "finetune_steps": STEPS, "weight_bits": 4, "activation_bits": (4, 8)}
    session = hq_plugin.meta_train(trained, batches, effort="smoke", **options)
    narrow = np.zeros_like(session.space.top)
    plain = LastingLosses(session.space, session.sensitivities, STEPS)
    measured = np.maximum(plain.plain, 0)[:, 0, 0].sum()
    curved = np.zeros_like(session.sensitivities)
    curved[:, :, 0] = 1e-6
    weighed = LastingLosses(session.space, session.sensitivities, STEPS, curved)
    assert measured > 0
    assert weighed.added(narrow) == pytest.approx(SECOND_ORDER * measured, rel=0.01)
