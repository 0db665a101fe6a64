"""The reference names all that is public, and describes each argument of it."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.docs.pages import ROOT

#: Modules whose `__all__` is public, by the name that the reference has for them; see docs/stability.md.
PUBLIC = {
    "hq_plugin": "hq_plugin",
    "hq_plugin.integrations.huggingface": "integrations.huggingface",
    "hq_plugin.integrations.onnxruntime": "integrations.onnxruntime",
    "hq_plugin.integrations.timm": "integrations.timm",
    "hq_plugin.integrations.torchao": "integrations.torchao",
}
#: What is public for the library itself, and not for people.
_INTERNAL = {"ADAPTER", "HqQuantizer", "__version__"}
_REFERENCE = (ROOT / "docs" / "reference.md").read_text()


def entries() -> list[str]:
    """Returns what the reference renders, each as `module.name`, importable."""
    found = re.findall(r"^::: (\S+)$", _REFERENCE, flags=re.MULTILINE)
    return [re.sub(r"^integrations\.", "hq_plugin.integrations.", name) for name in found]


def value(name: str) -> Any:
    """Imports what an entry names: a module, or something in one."""
    module, _, attribute = name.rpartition(".")
    held = importlib.import_module(module)
    return getattr(held, attribute) if hasattr(held, attribute) else importlib.import_module(name)


@pytest.mark.parametrize("module", PUBLIC)
def test_all_that_is_public_is_there(module: str) -> None:
    pytest.importorskip(module)
    rendered = [value(name) for name in entries()]
    errors = vars(importlib.import_module("hq_plugin.errors"))
    for name in set(importlib.import_module(module).__all__) - _INTERNAL - set(errors):
        public = getattr(importlib.import_module(module), name)
        assert any(public is each for each in rendered), f"{module}.{name} is not in docs/reference.md"


def functions() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yields every function, and every method that the reference shows, with its name."""
    for name in entries():
        thing = value(name)
        if inspect.isfunction(thing):
            yield name, thing
        elif inspect.isclass(thing):
            written = re.escape(name.replace("hq_plugin.integrations", "integrations"))
            shown = re.search(rf"^::: {written}\n(?:    .*\n)*?      members: \[(.*)\]", _REFERENCE, re.MULTILINE)
            for member in shown[1].split(", ") if shown else ():
                yield f"{name}.{member}", getattr(thing, member)


@pytest.mark.parametrize(("name", "function"), functions())
def test_arguments_are_described(name: str, function: Callable[..., Any]) -> None:
    takes = inspect.signature(function).parameters.keys() - {"self"}
    told = inspect.getdoc(function) or ""
    assert told
    for parameter in takes:
        described = re.search(rf"^ +\**{parameter}: ", told, flags=re.MULTILINE)
        assert described, f"{name} says nothing of {parameter}"
