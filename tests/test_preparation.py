"""What a session is made of before anything is trained."""

import pytest
import torch
from torch import nn

from hq_plugin import Config, meta_train
from hq_plugin.preparation import calibration_batches, rounding_batches


@pytest.mark.parametrize(
    ("batch", "given", "expected"),
    [(16, None, 16), (128, None, 4), (16, 20, 20), (16, 1, 16), (2, None, 64), (2, 66, 66)],
)
def test_weights_are_rounded_by_samples_enough(batch: int, given: int | None, expected: int) -> None:
    torch.manual_seed(0)
    data = [torch.randn(batch, 8) for _ in range(24 if batch > 2 else 120)]
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    config = Config(effort="smoke", batch_size=batch, calibration_batches=given, meta_steps=0)
    session = meta_train(model, data, config=config)
    assert len(rounding_batches(session.teacher, session.data, session.config)) == expected
    assert len(calibration_batches(session.teacher, session.data, session.config)) == (given or 4)


def test_all_that_there_is_where_data_is_short() -> None:
    torch.manual_seed(0)
    session = meta_train(
        nn.Linear(8, 3), [torch.randn(8, 8) for _ in range(6)], config=Config(effort="smoke", meta_steps=0)
    )
    taken = rounding_batches(session.teacher, session.data, session.config)
    assert 0 < len(taken) < 6
