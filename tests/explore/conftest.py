"""What the tests of exploring share: a saved session that has searched, and a server of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import Tensor, nn

import hq_plugin as hq
from hq_plugin.explore import Answers, Planner, Server
from hq_plugin.outline import Outline
from hq_plugin.session_store import read_session_outline
from tests.browser import Page, browser

Batches = list[tuple[Tensor, Tensor]]


@pytest.fixture(scope="session")
def saved_session(trained: nn.Module, batches: Batches, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("explore")
    save_file(trained.state_dict(), folder / "float.safetensors")
    options = {"meta_steps": 8, "finetune_steps": 2, "search_evaluations": 24}
    session = hq.meta_train(trained, batches, effort="smoke", activation_bits=(4, 8), **options)
    session.search("3bit")
    data = ("--data", "tests.conftest:digits_batches")
    session.source = ("tests.conftest:TinyNet", "--checkpoint", str(folder / "float.safetensors"), *data)
    return session.save(folder / "session")


@pytest.fixture(scope="session")
def outline(saved_session: Path) -> Outline:
    return read_session_outline(saved_session)


@pytest.fixture(scope="session")
def planner(outline: Outline) -> Planner:
    return Planner(outline)


@pytest.fixture(scope="session")
def server(outline: Outline, saved_session: Path) -> Iterator[Server]:
    with Server(Answers(outline, saved_session)) as serving:
        thread = threading.Thread(target=serving.serve_forever, daemon=True)
        thread.start()
        yield serving
        serving.shutdown()
        thread.join()


@pytest.fixture(scope="session")
def page() -> Iterator[Page]:
    with browser() as opened:
        yield opened
