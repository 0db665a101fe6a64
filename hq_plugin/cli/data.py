"""Data by reference: folders, files, functions, and the data sets of the demo."""

from __future__ import annotations

import importlib
import inspect
import re
import zipfile
from pathlib import Path
from typing import Any

from hq_plugin.cli.models import Source
from hq_plugin.cli.options import DATA
from hq_plugin.cli.references import call, integration
from hq_plugin.errors import DataError


def load_data(reference: str | None, source: Source, *, test: bool = False) -> Any:
    """Returns batches, a Dataset or a list of texts.

    Args:
        reference: What `options.DATA` describes, or None for no data.
        source: The model that they are for.
        test: Of a built-in data set, whether to take the test part.

    Raises:
        DataError: The data is not there or cannot be read.
    """
    if reference is None:
        return None
    if reference in ("digits", "fashion-mnist"):
        from torch.utils.data import TensorDataset

        integration("timm", f"data {reference!r} belongs to the demo")
        built_in = importlib.import_module("hq_plugin.integrations.timm.demo_data").built_in(reference)
        return TensorDataset(*(built_in[2:] if test else built_in[:2]))
    path = Path(reference)
    if path.is_dir():
        return _images(path, source)
    if path.is_file():
        return _arrays(path, source.model) if path.suffix == ".npz" else _texts(path, source)
    if ":" in reference:
        return call(reference, "data", {})
    raise DataError(f"data {reference!r} is not there. Possible: {DATA}")


def _images(folder: Path, source: Source) -> Any:
    if source.is_hugging_face:
        library = integration("huggingface.folder", f"{folder} is a folder of images")
        return library.ImageFolder(folder, source.model, source.processor)
    return integration("timm", f"{folder} is a folder of images, for timm models").ImageFolder(folder, source.model)


def _texts(path: Path, source: Source) -> list[str]:
    """Reads one text a line, or where there are blank lines, one a paragraph."""
    if not source.is_hugging_face:
        raise DataError(f"{path} is a file of text, and {type(source.model).__name__} is no Hugging Face model.")
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8, and no .npz file: {error}") from error
    paragraphs = [part for part in re.split(r"\n\s*\n", content) if part.strip()]
    texts = paragraphs if len(paragraphs) > 1 else content.splitlines()
    texts = [text.strip() for text in texts if text.strip()]
    if not texts:
        raise DataError(f"{path} holds no text.")
    return texts


def _arrays(path: Path, model: Any) -> Any:
    """Reads the arrays x and y of an .npz file, or those that are named as the model's inputs."""
    import numpy as np
    import torch
    from torch.utils.data import StackDataset, TensorDataset

    from hq_plugin.batch import label_names

    as_labels = label_names(model)
    names = [*inspect.signature(model.forward).parameters, *as_labels]
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: torch.from_numpy(arrays[name]) for name in arrays if name in {"x", *names}}
    except (ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is no .npz file of numbers: {error}") from error
    inputs = {name: _as_input(array) for name, array in found.items() if name not in as_labels}
    if not inputs:
        raise DataError(f"{path} has no array x: the inputs, one a row; and none named as an input of the model.")
    first, *others = found
    for name in others:
        if len(found[name]) != len(found[first]):
            raise DataError(
                f"{path} has {len(found[first])} rows in {first}, but {len(found[name])} in {name}: one for each "
                "sample."
            )
    labels = {name: array.long() for name, array in found.items() if name in as_labels}
    if set(inputs) == {"x"}:
        return TensorDataset(inputs["x"], *labels.values())
    columns: Any = inputs | labels
    return StackDataset(**columns)


def _as_input(array: Any) -> Any:
    """Token ids of any width stay whole numbers; all else, pictures in bytes too, becomes float32."""
    import torch

    others = array.is_floating_point() or array.is_complex() or array.dtype in (torch.uint8, torch.bool)
    return array.float() if others else array.long()
