from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch import nn

from hq_plugin import DataError, ModelError
from hq_plugin.integrations.timm import ImageFolder, data_config, transform


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return timm.create_model("test_resnet", num_classes=2)


def _picture(path: Path, color: tuple[int, int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (200, 170), color).save(path)


def test_folders_are_classes_in_the_order_of_their_names(tmp_path: Path, model: nn.Module) -> None:
    _picture(tmp_path / "b" / "1.png", (255, 0, 0))
    _picture(tmp_path / "b" / "2.png", (0, 255, 0))
    _picture(tmp_path / "a" / "deep" / "3.JPG", (0, 0, 255))
    (tmp_path / "b" / "notes.txt").write_text("no image")
    images = ImageFolder(tmp_path, model)
    assert images.classes == ["a", "b"]
    assert [images[i][1] for i in range(len(images))] == [0, 1, 1]
    with Image.open(tmp_path / "b" / "1.png") as image:
        assert torch.equal(images[1][0], transform(model)(image))


def test_images_without_folders_have_no_labels(tmp_path: Path) -> None:
    _picture(tmp_path / "1.png", (255, 0, 0))
    _picture(tmp_path / "more" / "2.png", (0, 255, 0))
    gray = timm.create_model("test_resnet", in_chans=1)
    images = ImageFolder(tmp_path, gray)
    assert images.labels is None
    assert [tuple(x.shape) for x in (images[0], images[1])] == [data_config(gray)["input_size"]] * 2


def test_what_is_no_image_is_named(tmp_path: Path, model: nn.Module) -> None:
    with pytest.raises(DataError, match="is no folder"):
        ImageFolder(tmp_path / "missing", model)
    with pytest.raises(DataError, match="holds no image"):
        ImageFolder(tmp_path, model)
    (tmp_path / "broken.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"broken\.png"):
        ImageFolder(tmp_path, model)[0]
    with pytest.raises(ModelError, match="not a timm model"):
        ImageFolder(tmp_path, nn.Linear(2, 2))
    with pytest.raises(DataError, match="2 channels"):
        ImageFolder(tmp_path, timm.create_model("test_resnet", in_chans=2))
