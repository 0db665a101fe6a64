from pathlib import Path

import pytest
import torch

from hq_plugin.cli.models import load_model, load_saved
from hq_plugin.errors import ArtifactError, ConfigError, HQError, ModelError
from tests.cli.conftest import MODEL


def not_a_model() -> int:
    return 3


@pytest.mark.parametrize(
    ("reference", "arguments", "says"),
    [
        ("no_such_net", (), "no model"),
        ("nowhere:f", (), "module:function"),
        ("tests.conftest:SITES", (), "not a function"),
        ("tests.cli.test_models:not_a_model", (), "not a torch.nn.Module"),
        ("timm:resnet10t", ("in_chans",), "name=value"),
        ("timm:resnet10t", ("no_such=1",), "no_such"),
        ("somebody/some-model", (), "hf:somebody/some-model"),
    ],
)
def test_bad_references(reference: str, arguments: tuple[str, ...], says: str) -> None:
    with pytest.raises(HQError, match=says):
        load_model(reference, arguments)


def test_pretrained_is_for_timm() -> None:
    for reference in (MODEL, "tests", "hf:somewhere"):
        with pytest.raises(ConfigError, match=r"timm|Hugging"):
            load_model(reference, pretrained=True)


def test_random_weights_follow_from_the_seed() -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(torch.seed() % 1000)  # as another process would have it
        return torch.cat([p.flatten() for p in load_model(MODEL, seed=seed).model.parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_a_checkpoint_of_another_model(checkpoint: Path) -> None:
    assert torch.equal(
        load_model(MODEL, checkpoint=checkpoint).model.head.bias,
        load_model(MODEL, checkpoint=checkpoint, seed=1).model.head.bias,
    )
    with pytest.raises(ModelError, match="does not fit"):
        load_model("test_resnet", checkpoint=checkpoint)


def test_no_saved_model(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="holds no saved"):
        load_saved(tmp_path)
