"""Data by reference: built-in sets, folders, files, functions."""

from __future__ import annotations

import importlib
import zipfile
from pathlib import Path
from typing import Any

from hq_plugin.cli.options import DATA
from hq_plugin.cli.references import call, timm
from hq_plugin.errors import DataError


def load_data(reference: str, model: Any, *, test: bool) -> Any:
    """Returns batches or a Dataset.

    Args:
        reference: What `options.DATA` describes.
        model: The model that they are for.
        test: Of a built-in data set, whether to take the test part.

    Raises:
        DataError: The data is not there or cannot be read.
    """
    if reference in ("digits", "fashion-mnist"):
        from torch.utils.data import TensorDataset

        timm(f"data {reference!r} belongs to the demo")
        built_in = importlib.import_module("hq_plugin.integrations.timm.demo_data").built_in(reference)
        return TensorDataset(*(built_in[2:] if test else built_in[:2]))
    path = Path(reference)
    if path.is_dir():
        return timm(f"{reference} is a folder of images, for timm models").ImageFolder(path, model)
    if path.suffix != ".npz" and ":" in reference:
        return call(reference, "data", {})
    if path.suffix != ".npz" or not path.exists():
        raise DataError(f"data {reference!r} is not there. Possible: {DATA}")
    return _arrays(path)


def _arrays(path: Path) -> Any:
    """Reads the arrays x and y of an .npz file."""
    import numpy as np
    import torch
    from torch.utils.data import TensorDataset

    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: torch.from_numpy(arrays[name]) for name in ("x", "y") if name in arrays}
    except (ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is no .npz file of numbers: {error}") from error
    if "x" not in found:
        raise DataError(f"{path} has no array x: the inputs, one a row.")
    if "y" in found and len(found["y"]) != len(found["x"]):
        raise DataError(f"{path} has {len(found['x'])} inputs in x, but {len(found['y'])} labels in y.")
    return TensorDataset(found["x"].float(), *(labels.long() for name, labels in found.items() if name == "y"))
