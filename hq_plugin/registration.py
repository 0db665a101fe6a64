"""Registers with libraries that must know of us before they load a file, whenever they are imported.

transformers has no entry points: whoever loads a packed model must have registered its format first. This
waits for the module that holds transformers' registry, and imports nothing by itself.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from hq_plugin.errors import HQWarning

#: Module of a library that holds its registry, to ours that registers there when it is imported.
REGISTRIES = {"transformers.quantizers.auto": "hq_plugin.integrations.huggingface.quantizer"}


class _Loader(Loader):
    """Runs a module by its own loader, and then imports what registers with it."""

    def __init__(self, loader: Any, ours: str) -> None:
        self._loader, self._ours = loader, ours

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _register(self._ours)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


class _Finder(MetaPathFinder):
    def __init__(self) -> None:
        self._busy = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in REGISTRIES or self._busy:
            return None
        self._busy = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._busy = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, REGISTRIES[fullname])
        return spec


def _register(ours: str) -> None:
    """Imports a module of ours; a library that it does not fit must go on working without it."""
    try:
        importlib.import_module(ours)
    except ImportError as error:
        warnings.warn(
            f"hq_plugin cannot register with this version of the library ({error}): its quantized models cannot be "
            "loaded by it. Upgrade the library.",
            HQWarning,
            stacklevel=2,
        )


def install() -> None:
    """Registers now with what is imported already, and with the rest when it is."""
    for registry, ours in REGISTRIES.items():
        if registry in sys.modules:
            _register(ours)
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
