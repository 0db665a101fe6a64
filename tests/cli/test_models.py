import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hq_plugin.cli.models import load_model, load_saved, load_trained_model, read_checkpoint
from hq_plugin.errors import ArtifactError, ConfigError, HQError, HQWarning, ModelError
from tests.cli.conftest import MODEL


def not_a_model() -> int:
    return 3


@pytest.mark.parametrize(
    ("reference", "arguments", "says"),
    [
        ("no_such_net", (), "no model"),
        ("mobilnetv2_100", (), "Close to it: mobilenetv2_100"),
        ("nowhere:f", (), "module:function"),
        ("tests.conftest:SITES", (), "not a function"),
        ("tests.cli.test_models:not_a_model", (), "not a torch.nn.Module"),
        ("timm:resnet10t", ("in_chans",), "name=value"),
        ("timm:resnet10t", ("no_such=1",), "no_such"),
        ("somebody/some-model", (), "hf:somebody/some-model"),
        ("tests.conftest.TinyNet", (), "write module:function"),
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


def test_a_timm_model_without_weights_is_noticed(tmp_path: Path) -> None:
    with pytest.warns(HQWarning, match=r"random weights.*--checkpoint"):
        source = load_trained_model("test_resnet", None, None, False, 0)
    save_file(source.model.state_dict(), tmp_path / "float.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_trained_model("test_resnet", None, tmp_path / "float.safetensors", False, 0)
        load_trained_model(MODEL, None, None, False, 0)  # whoever wrote it knows


def test_a_checkpoint_of_another_model(checkpoint: Path) -> None:
    assert torch.equal(
        load_model(MODEL, checkpoint=checkpoint).model.head.bias,
        load_model(MODEL, checkpoint=checkpoint, seed=1).model.head.bias,
    )
    with pytest.raises(ModelError, match="does not fit") as refused:
        load_model("test_resnet", checkpoint=checkpoint)
    assert "of the model's tensors are not in it" in str(refused.value)
    assert len(str(refused.value)) < 600, "a line, not a list of every tensor"


def test_a_checkpoint_of_other_shapes(trained: nn.Module, tmp_path: Path) -> None:
    weights = trained.state_dict()
    weights["head.bias"] = torch.zeros(3)
    save_file(weights, tmp_path / "float.safetensors")
    with pytest.raises(ModelError, match=r"does not fit .*size mismatch for head.bias"):
        load_model(MODEL, checkpoint=tmp_path / "float.safetensors")


def test_a_pickle_is_not_read_but_how_to_convert_it_is_said(trained: nn.Module, tmp_path: Path) -> None:
    pickled = tmp_path / "float.pth"
    torch.save(trained.state_dict(), pickled)
    with pytest.raises(ModelError, match="is a pickle") as refused:
        load_model(MODEL, checkpoint=pickled)
    code = str(refused.value).split('python -c "')[1].removesuffix('"')
    subprocess.run([sys.executable, "-c", code], check=True)
    loaded = load_model(MODEL, checkpoint=pickled.with_suffix(".safetensors")).model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in trained.state_dict().items())


class _Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("code of a checkpoint was run",))


@pytest.mark.parametrize("content", [{"a": _Runs()}, {"epoch": 3}, [1, 2], b"no checkpoint", b""])
def test_a_file_that_is_no_checkpoint(tmp_path: Path, content: object) -> None:
    path = tmp_path / "float.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    for name in ("float.pth", "float.safetensors"):
        with pytest.raises(ModelError, match=r"cannot be read|is a pickle"):
            read_checkpoint(path.rename(tmp_path / name))
        (tmp_path / name).rename(path)


def test_no_saved_model(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="holds no saved"):
        load_saved(tmp_path)


def test_what_is_quantized_already_is_no_float_model(saved: Path) -> None:
    with pytest.raises(ModelError, match="float model that it was made from"):
        load_model(str(saved))
