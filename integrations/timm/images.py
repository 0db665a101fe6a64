"""A folder of images as a Dataset for `quantize`, with the preprocessing of a timm model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn
from torch.utils.data import Dataset

from hq_plugin.errors import DataError
from hq_plugin.image_files import find_images
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
        channels = data_config(model)["input_size"][0]
        if channels not in _MODES:
            raise DataError(
                f"The model takes {channels} channels, and images have 1, 3 or 4. Pass batches instead."
            )
        self._mode, self._transform = _MODES[channels], transform(model)
        found = find_images(folder, timm.data.get_img_extensions(as_set=True))
        self.paths, self.labels, self.classes = found.paths, found.labels, found.classes

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor | tuple[Tensor, int]:
        try:
            with Image.open(self.paths[index]) as image:
                tensor: Tensor = self._transform(image.convert(self._mode))
        except (UnidentifiedImageError, OSError) as error:
            raise DataError(f"{self.paths[index]} cannot be read as an image: {error}. Remove it.") from error
        return tensor if self.labels is None else (tensor, self.labels[index])
