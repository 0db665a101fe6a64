"""Writes a report as a file, of the kind that its name says."""

from __future__ import annotations

import json
from pathlib import Path

from hq_plugin.distribution import is_first
from hq_plugin.errors import ArtifactPathError, ConfigError
from hq_plugin.report.gather import gather
from hq_plugin.report.page import page
from hq_plugin.result import Result
from hq_plugin.storage import write_text

#: Endings that are figures.
FIGURES = (".png", ".svg", ".pdf")


def write_report(result: Result, path: str | Path) -> Path:
    """Writes a report.

    Args:
        result: The result.
        path: Ends in `.html` (one page), `.json` (its data) or one of `FIGURES` (the overview, by matplotlib). The
            file appears whole or not at all; of several processes the first alone writes it.

    Raises:
        ConfigError: The name has another ending, or a figure is asked for without matplotlib.
        ArtifactPathError: The file cannot be written.
    """
    target = Path(path).expanduser()
    ending = target.suffix.lower()
    if ending not in (".html", ".json", *FIGURES):
        raise ConfigError(
            f"A report cannot be written as {target.name!r}: end the name in .html, .json or {', '.join(FIGURES)}."
        )
    if not is_first():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if ending in FIGURES:
            from hq_plugin.report.figures import draw, save

            save(draw(result), target)
        else:
            text = page(result) if ending == ".html" else json.dumps(gather(result).to_json(), indent=1)
            write_text(target, text)
    except OSError as error:
        raise ArtifactPathError(f"{target} could not be written: {error}.") from error
    return target
