import json
from pathlib import Path

import pytest

import hq_plugin as hq
from hq_plugin.errors import ArtifactPathError, ConfigError


@pytest.mark.parametrize(("name", "start"), [("r.html", b"<!doctype"), ("r.json", b"{"), ("r.png", b"\x89PNG")])
def test_the_name_says_the_kind(result: hq.Result, tmp_path: Path, name: str, start: bytes) -> None:
    path = result.report(tmp_path / "new" / name)
    assert path.read_bytes().startswith(start)
    assert [other.name for other in path.parent.iterdir()] == [name], "nothing is left beside it"


def test_json_is_the_data_of_the_page(result: hq.Result, tmp_path: Path) -> None:
    html = result.report(tmp_path / "r.html").read_text(encoding="utf-8")
    data = html.partition('<script type="application/json" id="data">')[2].partition("</script>")[0]
    assert json.loads(data) == json.loads(result.report(tmp_path / "r.json").read_text(encoding="utf-8"))


def test_a_figure_touches_nothing_beside_it(result: hq.Result, tmp_path: Path) -> None:
    (tmp_path / ".r.svg.part").write_text("mine")
    (tmp_path / "r.svg").write_text("old")
    assert result.report(tmp_path / "r.svg").read_text(encoding="utf-8").startswith("<?xml")
    assert (tmp_path / ".r.svg.part").read_text() == "mine"


def test_other_names_and_places_are_errors(result: hq.Result, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\.html"):
        result.report(tmp_path / "report.docx")
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactPathError, match="could not be written"):
        result.report(tmp_path / "file" / "report.html")
