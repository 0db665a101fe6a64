"""A folder of images as a Dataset for `quantize`, with the preprocessing of a timm model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn
from torch.utils.data import Dataset

from hq_plugin.errors import DataError
from hq_plugin.integrations.timm.adapter import data_config, transform

#: How an image is read for a model of so many input channels.
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class ImageFolder(Dataset[Any]):
    """Images of a folder as tensors `[channels, height, width]`, as the model takes them.

    Where the folder holds only folders, each is a class: samples are `(image, label)`, and labels count
    the folders in the order of their names, which must be the order of the model's classes. Where it
    holds images (any depth below is searched), samples are images without a label.

    Args:
        folder: The folder.
        model: A timm model, float or quantized, which says size and normalisation.

    Attributes:
        paths: The image files.
        labels: Their labels, or None.
        classes: The names of the classes, empty where there are none.

    Raises:
        DataError: The folder is not there or holds no image, or the model's input channels fit no image.
        ModelError: The model is not timm's.
    """

    def __init__(self, folder: str | Path, model: nn.Module) -> None:
        root = Path(folder)
        if not root.is_dir():
            raise DataError(f"{root} is no folder. Give a folder of images.")
        channels = data_config(model)["input_size"][0]
        if channels not in _MODES:
            raise DataError(
                f"The model takes {channels} channels, and images have 1, 3 or 4. Pass batches instead."
            )
        self._mode, self._transform = _MODES[channels], transform(model)
        entries = sorted(path for path in root.iterdir() if not path.name.startswith("."))
        flat = any(path.is_file() and _is_image(path) for path in entries)
        folders = [] if flat else [path for path in entries if path.is_dir()]
        found = {path.name: _images(path) for path in folders}
        self.classes = [name for name, paths in found.items() if paths]
        self.labels: list[int] | None = None
        if flat or len(self.classes) < 2:
            # One folder inside tells no classes apart.
            self.classes, self.paths = [], _images(root)
        else:
            self.paths = [path for name in self.classes for path in found[name]]
            self.labels = [label for label, name in enumerate(self.classes) for _ in found[name]]
        if not self.paths:
            raise DataError(f"{root} holds no image ({', '.join(timm.data.get_img_extensions())}).")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor | tuple[Tensor, int]:
        try:
            with Image.open(self.paths[index]) as image:
                tensor: Tensor = self._transform(image.convert(self._mode))
        except (UnidentifiedImageError, OSError) as error:
            raise DataError(f"{self.paths[index]} cannot be read as an image: {error}. Remove it.") from error
        return tensor if self.labels is None else (tensor, self.labels[index])


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and _is_image(path))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in timm.data.get_img_extensions(as_set=True)
