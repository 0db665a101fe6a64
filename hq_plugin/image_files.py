"""Which files of a folder are pictures, and what class each is of; reading them is the integrations' part."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from hq_plugin.errors import DataError


@dataclass(frozen=True)
class ImageFiles:
    """The pictures of a folder.

    Attributes:
        paths: The files.
        labels: Number of each one's class, or None where there are no classes.
        classes: Names of the classes.
    """

    paths: list[Path]
    labels: list[int] | None
    classes: list[str]


def find_images(folder: str | Path, extensions: Collection[str]) -> ImageFiles:
    """Finds the pictures of a folder.

    Where the folder holds only folders, each is a class, and labels count the folders in the order of their
    names, which must be the order of the model's classes. Where it holds pictures (any depth below is searched),
    there are no labels.

    Args:
        folder: The folder.
        extensions: What names of pictures end with, `.png` and so on, in small letters.

    Raises:
        DataError: The folder is not there or holds no picture.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{root} is no folder. Give a folder of images.")

    def below(place: Path) -> list[Path]:
        return sorted(path for path in place.rglob("*") if path.is_file() and path.suffix.lower() in extensions)

    entries = sorted(path for path in root.iterdir() if not path.name.startswith("."))
    flat = any(path.is_file() and path.suffix.lower() in extensions for path in entries)
    found = {path.name: below(path) for path in ([] if flat else entries) if path.is_dir()}
    classes = list(found)  # empty ones, too: who trained on all of them numbered them so
    if flat or sum(bool(paths) for paths in found.values()) < 2:  # one folder inside tells no classes apart
        files = ImageFiles(below(root), None, [])
    else:
        paths = [path for name in classes for path in found[name]]
        labels = [label for label, name in enumerate(classes) for _ in found[name]]
        files = ImageFiles(paths, labels, classes)
    if not files.paths:
        raise DataError(f"{root} holds no image ({', '.join(sorted(extensions))}).")
    return files
