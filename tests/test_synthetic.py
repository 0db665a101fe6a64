import pytest
import torch
from torch import Tensor, nn

from hq_plugin import HQWarning
from hq_plugin.data import Data
from hq_plugin.synthetic import synthetic_data
from tests.conftest import TinyNet


def make(model: nn.Module, steps: int = 0) -> Data:
    with pytest.warns(HQWarning, match="Real data"):
        return synthetic_data(model, batch_size=32, batches=2, held=1, seed=0, steps=steps)


def statistics_error(model: nn.Module, x: Tensor) -> float:
    """How far the mean of the second BatchNorm's input is from the stored one, in deviations."""
    seen: list[Tensor] = []
    handle = model.bn2.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(x)
    handle.remove()
    bn = model.bn2
    return float(((seen[0].mean((0, 2, 3)) - bn.running_mean) / bn.running_var.sqrt()).abs().mean())


def test_inputs_are_trained_to_the_batchnorm_statistics(trained: nn.Module) -> None:
    noise, fitted = make(trained, steps=0), make(trained, steps=40)
    before = statistics_error(trained, noise.holdout[0].args[0])
    after = statistics_error(trained, fitted.holdout[0].args[0])
    assert after < 0.5 * before


def test_the_model_is_not_changed_and_batches_differ(trained: nn.Module) -> None:
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    data = make(trained, steps=3)
    assert all(torch.equal(before[name], value) for name, value in trained.state_dict().items())
    first, second = (batch.args[0] for batch in data.train)
    assert not torch.equal(first, second)
    assert not first.requires_grad
    assert data.synthetic


@pytest.mark.parametrize(
    ("model", "shape", "dtype"),
    [
        (TinyNet(), (32, 1, 32, 32), torch.float32),
        (nn.Sequential(nn.Linear(7, 3)), (32, 7), torch.float32),
        (nn.Sequential(nn.Linear(7, 3)).double(), (32, 7), torch.float64),
        (nn.Sequential(nn.Conv1d(3, 4, 5)), (32, 3, 128), torch.float32),
        (nn.Sequential(nn.Embedding(9, 4)), (32, 64), torch.int64),
    ],
)
def test_the_shape_is_found_by_trying(model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    batch = make(model.eval()).holdout[0]
    assert (tuple(batch.args[0].shape), batch.args[0].dtype) == (shape, dtype)
