import builtins
from typing import Any

import psutil
import pytest
import torch

from hq_plugin.memory import peak_memory


def test_the_peak_holds_what_was_allocated() -> None:
    before = peak_memory()["process"]
    assert psutil.Process().memory_info().rss <= before * 1.05
    held = torch.ones(48 << 20, dtype=torch.uint8)
    while psutil.Process().memory_info().rss < before + (32 << 20):
        held = torch.cat([held, held])
    del held
    after = peak_memory()["process"]
    assert after >= before + (30 << 20), "the peak stays once memory is free again"


def test_systems_without_resource(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "resource":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr(psutil, "Process", lambda: _Process())
    assert peak_memory()["process"] == 12345


class _Process:
    def memory_info(self) -> Any:
        return type("Info", (), {"peak_wset": 12345})
