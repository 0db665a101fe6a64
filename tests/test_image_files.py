from pathlib import Path

import pytest

from hq_plugin.errors import DataError
from hq_plugin.image_files import find_images


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_folders_of_one_folder_are_classes(tmp_path: Path) -> None:
    touch(tmp_path, "b/2.PNG", "b/deep/1.png", "a/1.png", "another/notes.txt", ".hidden/1.png", "readme.txt")
    found = find_images(tmp_path, {".png"})
    assert [path.name for path in found.paths] == ["1.png", "2.PNG", "1.png"]
    assert (found.labels, found.classes) == ([0, 2, 2], ["a", "another", "b"])


def test_pictures_side_by_side_have_no_labels(tmp_path: Path) -> None:
    touch(tmp_path, "1.png", "a/2.png", "b/3.png")
    assert find_images(tmp_path, {".png"}).labels is None
    assert len(find_images(tmp_path, {".png"}).paths) == 3


def test_no_picture(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no image \(.jpg, .png\)"):
        find_images(tmp_path, {".png", ".jpg"})
    with pytest.raises(DataError, match="no folder"):
        find_images(tmp_path / "nowhere", {".png"})
