"""Every block of Python in the docs runs, every command is one that there is, and every link leads somewhere.

The blocks of a page share their names, as a reader would run them one after another. Efforts are cut to a handful
of steps: what is tested is that the code runs, and what it says with `assert`.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from unittest import mock

import pytest
import typer
from click.exceptions import UsageError

from hq_plugin.cli import app
from hq_plugin.config import Config
from tests.docs.pages import ROOT, blocks, pages
from tests.docs.setups import SETUPS

#: Most blocks that may be marked as not run.
MOST_NOT_RUN = 2


def python_pages() -> list[str]:
    return [page for page in pages() if any(block.language == "python" for block in blocks(page))]


_CHECK = Config.__post_init__


def smoke(config: Config) -> None:
    """Gives every configuration the least effort, integrations' step counts included, and checks it as ever."""
    object.__setattr__(config, "effort", "smoke")
    _CHECK(config)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("page", python_pages())
def test_python(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Config, "__post_init__", smoke)
    names = {"__name__": "__main__"}
    prepared = iter(SETUPS[page]()) if page in SETUPS else iter(())
    for block in blocks(page):
        if block.language != "python" or block.not_run:
            continue
        names.update(next(prepared, {}))
        # Empty lines in front, so that a traceback names the line of the page.
        exec(compile("\n" * block.line + block.code, str(ROOT / page), "exec"), names)


def test_few_blocks_are_not_run() -> None:
    reasons = [block.not_run for page in pages() for block in blocks(page) if block.not_run]
    assert len(reasons) <= MOST_NOT_RUN, reasons


def commands() -> list[tuple[str, str]]:
    """Returns every line of a block that calls hq-plugin, with its page."""
    found = []
    for page in pages():
        for block in blocks(page):
            if block.language in ("", "bash", "sh", "console"):
                # Without a comment, or what the output is piped to.
                lines = (re.sub(r"\s+[#|] .*", "", line).removeprefix("$ ") for line in block.code.splitlines())
                found += [(page, line) for line in lines if line.startswith("hq-plugin ")]
    return found


@pytest.mark.parametrize(("page", "line"), commands())
def test_command(page: str, line: str) -> None:
    """Parsed as it would be, and not run."""
    group = typer.main.get_command(app)
    name, *arguments = shlex.split(line)[1:]
    if name.startswith("-"):
        assert any(name in parameter.opts for parameter in group.params), line
        return
    command = group.commands[name]  # type: ignore[attr-defined]
    try:
        with mock.patch("pathlib.Path.exists", return_value=True):
            command.make_context(name, arguments)
    except UsageError as error:
        pytest.fail(f"{page}: {line}: {error.format_message()}")


@pytest.mark.parametrize("page", pages())
def test_links_lead_somewhere(page: str) -> None:
    """Links within the repository; mkdocs checks those of the site, names of headings included."""
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target and not target.startswith("#"):
            place = (ROOT / page).parent / target.partition("#")[0]
            assert place.exists(), f"{page} links to {target}"
