from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hq_plugin as hq
from hq_plugin import ArtifactError, ConfigError, ModelError
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


@pytest.mark.parametrize("options", [{"seed": 1}, {"holdout": 32}, {"loss": "mse"}])
def test_options_that_what_was_measured_follows_from_cannot_change(
    options: dict[str, Any], session: Session, tmp_path: Path, trained: nn.Module, batches: Batches
) -> None:
    with pytest.raises(ConfigError, match="holds out"):
        hq.load_session(session.save(tmp_path / "session"), trained, batches, **options)


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    return 1 - nn.functional.cosine_similarity(student, teacher, dim=1).mean()


def pictures(raw: Any) -> Any:
    return (raw[0],), {}, raw[1]


def test_functions_are_asked_for_again(tmp_path: Path, trained: nn.Module, batches: Batches) -> None:
    functions: dict[str, Any] = {"loss": cosine, "prepare_batch": pictures}
    made = hq.meta_train(trained, batches, effort="smoke", meta_steps=1, progress=False, **functions)
    saved = made.save(tmp_path / "session")
    for wrong in ({"prepare_batch": pictures}, {"loss": cosine}, {**functions, "loss": lambda s, t: cosine(s, t)}):
        with pytest.raises(ConfigError, match="a function, which no file holds"):
            hq.load_session(saved, trained, batches, **wrong)
    again = hq.load_session(saved, trained, batches, **functions)
    policy = again.baselines("4bit")["dynamic_programming"]
    assert again.finetune(policy, steps=1).hq.kl == made.finetune(policy, steps=1).hq.kl


@pytest.mark.parametrize("options", [{"target": "torch"}, {"pinned": {"stem": 8}}, {"groups": [["stem", "head"]]}])
def test_options_that_shape_the_search_space_cannot_change(
    options: dict[str, Any], session: Session, tmp_path: Path, trained: nn.Module, batches: Batches
) -> None:
    with pytest.raises(ConfigError, match="cannot change in a session"):
        hq.load_session(session.save(tmp_path / "session"), trained, batches, **options)


def test_options_that_are_as_they_were_are_no_change(
    session: Session, tmp_path: Path, trained: nn.Module, batches: Batches
) -> None:
    saved = session.save(tmp_path / "session")
    same = {"seed": session.config.seed, "target": "storage", "weight_bits": list(session.config.weight_bits)}
    assert hq.load_session(saved, trained, batches, **same).space == session.space


def test_another_effort_holds_out_what_was_not_trained_on(
    session: Session, tmp_path: Path, trained: nn.Module, batches: Batches
) -> None:
    again = hq.load_session(session.save(tmp_path / "session"), trained, batches, effort="fast")
    assert again.config.steps.finetune > session.config.steps.finetune
    for mine, theirs in zip(again.data.holdout, session.data.holdout, strict=True):
        assert torch.equal(mine.args[0], theirs.args[0])


def test_a_loaded_session_keeps_what_it_does(
    session: Session, tmp_path: Path, trained: nn.Module, batches: Batches
) -> None:
    saved = session.save(tmp_path / "session")
    assert hq.load_session(saved, trained, batches).checkpoint is None
    packed: list[Any] = [
        hq.load_session(saved, trained, batches, checkpoint_dir=tmp_path / "work", progress=False).quantize("4bit")
        for _ in range(2)
    ]
    assert packed[1].hq.seconds["search"] < packed[0].hq.seconds["search"] or packed[0].hq == packed[1].hq
    assert (tmp_path / "work").is_dir()
    other = hq.meta_train(trained, batches, effort="smoke", meta_steps=1, search_evaluations=12, hidden=4)
    with pytest.raises(ArtifactError, match="session"):
        hq.load_session(other.save(tmp_path / "other"), trained, batches, checkpoint_dir=tmp_path / "work")


def test_a_budget_may_be_text_and_is_what_was_searched_under(session: Session) -> None:
    found = session.search("4bit")
    named: Any = session.finetune(found, budget="5bit", steps=0)
    unnamed: Any = session.finetune(found, steps=0)
    given: Any = session.finetune(found.policy, steps=0)
    assert (named.hq.budget, unnamed.hq.budget, given.hq.budget) == ("5bit", "4bit", "given policy")


class Counting(nn.Module):
    """Changes its own state in each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(50, 16, max_norm=1.0), nn.Linear(16, 4)
        self.register_buffer("forwards", torch.zeros(()))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.forwards += 1
        return self.head(self.words(ids).mean(1))


def test_a_model_that_a_forward_changes_is_known_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, data = Counting(), [torch.randint(50, (8, 5)) for _ in range(6)]
    session = hq.meta_train(model, data, effort="smoke", progress=False)
    session.save(tmp_path / "session")
    again = hq.load_session(tmp_path / "session", model, data)
    again.save(tmp_path / "again")
    hq.load_session(tmp_path / "again", model, data)
    with torch.no_grad():
        model.head.weight[0] += 1
    with pytest.raises(ModelError, match="another float model"):
        hq.load_session(tmp_path / "again", model, data)
