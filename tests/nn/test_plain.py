import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import hq_plugin as hq
from hq_plugin import HybridPolicy, LayerBits, torch_ao
from hq_plugin.nn import PackedConv1d, PackedLinear, parametrized_weight, with_plain_weights

X = torch.randn(8, 4, 12, generator=torch.Generator().manual_seed(0))
OPTIONS = {"effort": "smoke", "meta_steps": 1, "finetune_steps": 1, "search_evaluations": 2, "progress": False}


class Sound(nn.Module):
    """What speech encoders do: a convolution with weight norm over positions; and a spectral norm, with buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = parametrizations.weight_norm(nn.Conv1d(4, 16, 3, padding=1), dim=2)
        self.hidden = parametrizations.spectral_norm(nn.Linear(16, 16))
        self.head = nn.Linear(16, 5)
        self.unused = parametrizations.weight_norm(nn.Linear(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(torch.relu(self.conv(x)).mean(-1))))


@pytest.fixture
def model() -> Sound:
    torch.manual_seed(0)
    return Sound().eval()


def test_the_value_becomes_the_parameter(model: Sound) -> None:
    plain = with_plain_weights(model, ["conv", "hidden", "head", "nothing"])
    assert type(plain.conv) is nn.Conv1d
    assert type(plain.hidden) is nn.Linear
    assert torch.equal(plain(X), model(X))
    # The model that it was made of still computes its weights, and so do copies of it.
    assert parametrized_weight(model.conv)
    assert torch.equal(copy.deepcopy(model)(X), plain(X))
    assert with_plain_weights(plain, ["conv", "hidden", "head"]) is plain


def test_a_skeleton_without_values_gets_the_shapes(model: Sound) -> None:
    empty = copy.deepcopy(model)
    for name in ("conv", "hidden"):  # parameters without values, buffers with them
        module = empty.get_submodule(name)
        for part in module.modules():
            for key, parameter in part._parameters.items():
                part._parameters[key] = None if parameter is None else nn.Parameter(parameter.detach().to("meta"))
    plain = with_plain_weights(empty, ["conv", "hidden"], inplace=True)
    assert plain is empty
    assert (plain.conv.weight.shape, plain.hidden.weight.shape) == ((16, 4, 3), (16, 16))
    assert plain.conv.weight.is_meta


def test_other_computed_parameters_are_left(model: Sound) -> None:
    parametrize.register_parametrization(model.conv, "bias", nn.Identity())
    assert with_plain_weights(model, ["conv"]) is model


def test_quantized_saved_and_loaded(model: Sound, tmp_path: Path) -> None:
    data = [X for _ in range(3)]
    small = hq.quantize(model, "4bit", data, **OPTIONS)  # type: ignore[arg-type]
    assert isinstance(small.conv, PackedConv1d)
    assert isinstance(small.hidden, PackedLinear)
    assert parametrized_weight(small.unused), "what never runs stays as it is"
    assert parametrized_weight(model.conv), "the model is not changed"
    hq.save(small, tmp_path / "small")
    assert torch.equal(hq.load(tmp_path / "small", Sound())(X), small(X))
    kept = hq.quantize(model, "4bit", data, exclude=("conv",), **OPTIONS)  # type: ignore[arg-type]
    assert parametrized_weight(kept.conv)
    hq.save(kept, tmp_path / "kept")
    assert torch.equal(hq.load(tmp_path / "kept", Sound())(X), kept(X))


def test_a_policy_may_name_them(model: Sound) -> None:
    prepared = torch_ao.prepare(model, HybridPolicy(dict.fromkeys(("conv", "hidden", "head"), LayerBits(8, 16))))
    assert torch.allclose(torch_ao.convert(prepared)(X), model(X), atol=0.02)
