import copy
import dataclasses
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import hq_plugin as hq
from hq_plugin import ArtifactError, HQWarning, HybridPolicy, LayerBits, ModelError, torch_ao
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
    rebuilt.load_state_dict(model.state_dict(), assign=True)


@pytest.mark.parametrize(
    ("name", "meta"), [("resnet10t", True), ("vit_tiny_patch16_224", True), ("swin_tiny_patch4_window7_224", False)]
)
def test_rebuilding_initialises_nothing_but_tables(name: str, meta: bool) -> None:
    model = timm.create_model(name)
    rebuilt = ADAPTER.rebuild({"name": name, "arguments": {}})
    # Swin's tables of relative positions go where its weights are: it is built in full.
    assert next(rebuilt.parameters()).is_meta == meta
    for (before, expected), (after, found) in zip(model.named_buffers(), rebuilt.named_buffers(), strict=True):
        assert before == after
        assert torch.equal(expected, found)


@pytest.mark.parametrize(
    ("name", "arguments", "recovered"),
    [
        ("resnet10t", {"global_pool": "max"}, {"global_pool": "max"}),
        (
            "vit_tiny_patch16_224",
            {"global_pool": "avg", "img_size": 64},
            {"global_pool": "avg", "img_size": [64, 64]},
        ),
        ("vit_tiny_patch16_224", {"dynamic_img_size": True}, {"dynamic_img_size": True}),
        ("maxvit_tiny_rw_224", {"img_size": 256}, {"img_size": [256, 256]}),
    ],
)
def test_recovers_settings_that_change_outputs_but_no_tensor(
    name: str, arguments: dict[str, object], recovered: dict[str, object]
) -> None:
    with torch.device("meta"):
        description = ADAPTER.describe(timm.create_model(name, **arguments))
    assert description is not None
    assert recovered.items() <= description["arguments"].items()


def test_what_cannot_be_recovered_is_not_described() -> None:
    model = timm.create_model("resnet10t")
    model.act1 = nn.GELU()
    assert ADAPTER.describe(model) is None
    assert ADAPTER.describe(timm.create_model("resnet10t", output_stride=8)) is None
    assert ADAPTER.describe(create_model("resnet10t", output_stride=8)) is not None


def test_dropout_does_not_matter() -> None:
    description = ADAPTER.describe(timm.create_model("resnet10t", drop_rate=0.3, drop_path_rate=0.1))
    assert description is not None
    assert description["arguments"] == {"num_classes": 1000, "in_chans": 3}


def test_a_packed_model_is_described_as_its_float_model() -> None:
    model = timm.create_model("test_resnet", num_classes=5).eval()
    policy = HybridPolicy({name: LayerBits(4, 16) for name, m in model.named_modules() if type(m) is nn.Conv2d})
    assert (
        ADAPTER.describe(torch_ao.convert(torch_ao.prepare(model, policy))) == ADAPTER.describe(model) is not None
    )


def test_a_packed_model_on_other_kernels_is_described_all_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64)
    model = timm.create_model("mobilenetv3_small_050", num_classes=3).eval()
    small = hq.quantize(
        model, "4bit", [x, x], config=dataclasses.replace(SMOKE, target="torch", activation_bits=(8,))
    )
    assert any(choice.folded for choice in hq.choose_kernels(small, x).values())
    hq.save(small, tmp_path / "saved")
    expected = copy.deepcopy(small)(x)
    torch.testing.assert_close(load(tmp_path / "saved")(x), expected)


def test_groups_are_not_in_the_way_of_a_description() -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=4).eval()
    policy = HybridPolicy({"blocks.0.mlp.fc1": LayerBits(4, 16, 64)})
    packed = torch_ao.convert(torch_ao.prepare(model, policy))
    assert ADAPTER.describe(packed) == ADAPTER.describe(model) is not None


def test_the_preprocessing_is_that_of_the_saved_model() -> None:
    model = timm.create_model("resnet10t")
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": (0.1, 0.2, 0.3), "crop_pct": 0.5}
    description = ADAPTER.describe(model)
    assert description is not None
    assert data_config(ADAPTER.rebuild(description)) == data_config(model)
    with pytest.raises(ArtifactError, match="preprocessing"):
        ADAPTER.rebuild({**description, "preprocessing": {"url": "http://localhost"}})


def test_nothing_is_fetched_for_a_saved_architecture() -> None:
    for argument in ("pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        with pytest.raises(ArtifactError, match=argument):
            ADAPTER.rebuild({"name": "resnet10t", "arguments": {argument: "x"}})
    with pytest.raises(ArtifactError, match="cannot be rebuilt"):
        ADAPTER.rebuild({"name": "resnet10t", "arguments": {"no_such": 1}})


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
