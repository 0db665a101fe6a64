"""Reads the pages of the docs: their blocks of code, with where they are."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(r"^```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
_NOT_RUN = re.compile(r"<!-- not run: (?P<reason>[^>]+?) -->\s*\Z")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language (empty for plain text), its code, its first line in the page.

    `not_run` is the reason in `<!-- not run: REASON -->` above it, if there is one.
    """

    language: str
    code: str
    line: int
    not_run: str | None


def pages() -> list[str]:
    """Returns every page of ours, relative to the repository."""
    top = [path for path in ROOT.glob("*.md") if path.name != "CHANGELOG.md"]
    return sorted(str(path.relative_to(ROOT)) for path in [*top, *(ROOT / "docs").rglob("*.md")])


def blocks(page: str) -> Iterator[Block]:
    """Yields the fenced blocks of a page."""
    text = (ROOT / page).read_text()
    for match in _BLOCK.finditer(text):
        marked = _NOT_RUN.search(text[: match.start()])
        line = text.count("\n", 0, match.start("code"))
        yield Block(match["language"], match["code"], line, marked["reason"] if marked else None)
