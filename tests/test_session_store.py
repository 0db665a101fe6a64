from pathlib import Path

import pytest
from torch import Tensor, nn

import hq_plugin as hq
from hq_plugin import ArtifactError, ConfigError
from hq_plugin.session import Session
from hq_plugin.session_store import FORMAT, VERSION, read_session_outline
from hq_plugin.storage import read_json, write_directory

Batches = list[tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def session(trained: nn.Module, batches: Batches) -> Session:
    made = hq.meta_train(trained, batches, effort="smoke", meta_steps=1, search_evaluations=12)
    made.search("4bit")
    return made


def test_an_outline_needs_no_model(session: Session, tmp_path: Path) -> None:
    outline = read_session_outline(session.save(tmp_path / "session"))
    assert outline.model == "TinyNet"
    assert outline.distance == "KL divergence"
    assert outline.space == session.space
    assert len(outline.scored) > 1


def test_a_loaded_session_keeps_what_was_scored_and_the_memory(
    session: Session, tmp_path: Path, trained: nn.Module, batches: Batches
) -> None:
    session.source = ("module:function",)
    again = hq.load_session(session.save(tmp_path / "session"), trained, batches)
    assert again.source == session.source
    assert again.memory == session.memory
    assert {s.genome.tobytes() for s in again.scored} == {s.genome.tobytes() for s in session.scored}
    again.save(tmp_path / "again")
    assert len(read_session_outline(tmp_path / "again").scored) == len(again.scored)


def test_options_that_shape_the_network_cannot_change(
    session: Session, tmp_path: Path, trained: nn.Module, batches: Batches
) -> None:
    saved = session.save(tmp_path / "session")
    with pytest.raises(ConfigError, match=r"weight_bits, rank cannot change in a session"):
        hq.load_session(saved, trained, batches, weight_bits=(2, 4), rank=2)


def test_a_session_of_an_earlier_version_says_what_to_do(tmp_path: Path) -> None:
    write_directory(tmp_path / "old", FORMAT, VERSION, {"sensitivities": []}, {})
    assert "outline" not in read_json(tmp_path / "old", FORMAT, VERSION)
    with pytest.raises(ArtifactError, match="save it again"):
        read_session_outline(tmp_path / "old")
