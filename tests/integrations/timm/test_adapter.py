import copy
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import hq_plugin as hq
from hq_plugin import HQWarning, ModelError
from hq_plugin.integrations.timm import ADAPTER, create_model, data_config, load, transform

SMOKE = hq.Config(effort="smoke", meta_steps=2, finetune_steps=1, search_evaluations=3, holdout=4, batch_size=4)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("resnet10t", {}),
        ("resnet10t", {"num_classes": 7, "in_chans": 1}),
        ("mobilenetv3_small_050", {"num_classes": 0}),
        ("vit_tiny_patch16_224", {"img_size": 64, "num_classes": 3}),
    ],
)
def test_recovers_what_timm_forgets(name: str, arguments: dict[str, int]) -> None:
    model = timm.create_model(name, **arguments)
    description = ADAPTER.describe(copy.deepcopy(model))
    assert description is not None
    rebuilt = ADAPTER.rebuild(description)
    rebuilt.load_state_dict(model.state_dict())


def test_own_arguments_are_remembered() -> None:
    arguments = {"in_chans": 1, "num_classes": 10, "channels": (8, 16, 32, 32), "stem_width": 8}
    assert ADAPTER.describe(timm.create_model("resnet10t", **arguments)) is None
    description = ADAPTER.describe(copy.deepcopy(create_model("resnet10t", **arguments)))
    assert description is not None
    assert description["arguments"]["channels"] == [8, 16, 32, 32]


def test_input_size_mean_and_std_come_from_the_pretrained_configuration() -> None:
    config = data_config(timm.create_model("tf_efficientnet_lite0"))
    assert (config["input_size"], config["mean"], config["interpolation"]) == (
        (3, 224, 224),
        (0.5, 0.5, 0.5),
        "bicubic",
    )
    gray = data_config(timm.create_model("resnet10t", in_chans=1))
    assert gray["input_size"][0] == len(gray["mean"]) == 1
    assert data_config(timm.create_model("vit_tiny_patch16_224", img_size=64))["input_size"] == (3, 64, 64)
    with pytest.raises(ModelError, match="not a timm model"):
        data_config(nn.Linear(2, 2))


def test_transform_makes_what_the_model_takes() -> None:
    from PIL import Image

    model = timm.create_model("resnet10t")
    image = transform(model)(Image.new("RGB", (300, 200), (128, 128, 128)))
    assert tuple(image.shape) == data_config(model)["input_size"]


def test_no_special_call_is_needed(tmp_path: Path) -> None:
    model = timm.create_model("test_efficientnet", num_classes=5).eval()
    x = torch.randn(4, *data_config(model)["input_size"])
    small = hq.quantize(model, "4bit", [x, x], config=SMOKE)
    hq.save(small, tmp_path / "model")
    assert torch.equal(load(tmp_path / "model")(x), small(x))


def test_without_data_images_of_the_right_size_are_made() -> None:
    model = timm.create_model("test_resnet", num_classes=5).eval()
    with pytest.warns(HQWarning, match="synthetic"):
        small = hq.quantize(model, "4bit", config=SMOKE)
    assert small.hq.effective_bits <= 4
