"""The figures of docs/method.md are there, and the script that draws them runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


def shown() -> set[str]:
    return set(re.findall(r"\]\(figures/(\w+)\.svg\)", (DOCS / "method.md").read_text()))


def test_figures_are_small_and_all_of_them_there() -> None:
    there = {path.stem: path.stat().st_size for path in (DOCS / "figures").glob("*.svg")}
    assert shown() <= there.keys()
    assert max(there.values()) < 200_000


@pytest.mark.slow
def test_they_can_be_drawn_again(tmp_path: Path) -> None:
    subprocess.run([sys.executable, DOCS / "figures" / "draw.py", tmp_path, "smoke"], check=True)
    assert shown() <= {path.stem for path in tmp_path.glob("*.svg")}
