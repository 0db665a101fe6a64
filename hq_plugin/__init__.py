"""Automatic low-bit hybrid quantization by meta learning, as a plugin for torch.ao.

    import hq_plugin as hq

    small = hq.quantize(model, "3bit", data=loader)
    hq.save(small, "small")

The method is Wang et al., arXiv:2004.11506.

What `__all__` names is imported when it is first asked for, and so are the modules: `hq-plugin --help`, which
imports this file like everything else in the package, answers without waiting for torch.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from hq_plugin import registration

if TYPE_CHECKING:
    from hq_plugin.api import export, load_session, meta_train, profile, quantize
    from hq_plugin.artifact import load, save
    from hq_plugin.budget import Budget
    from hq_plugin.config import Config
    from hq_plugin.errors import (
        ArtifactError,
        ArtifactPathError,
        BudgetError,
        ConfigError,
        DataError,
        EngineError,
        ExportError,
        HQError,
        HQWarning,
        KernelError,
        ModelError,
        PolicyError,
        TrainingError,
    )
    from hq_plugin.kernels import choose_kernels
    from hq_plugin.policy import HybridPolicy, LayerBits
    from hq_plugin.profiles import Profile
    from hq_plugin.result import Result
    from hq_plugin.session import Session

__version__ = "0.1.0"

__all__ = [
    "ArtifactError",
    "ArtifactPathError",
    "Budget",
    "BudgetError",
    "Config",
    "ConfigError",
    "DataError",
    "EngineError",
    "ExportError",
    "HQError",
    "HQWarning",
    "HybridPolicy",
    "KernelError",
    "LayerBits",
    "ModelError",
    "PolicyError",
    "Profile",
    "Result",
    "Session",
    "TrainingError",
    "__version__",
    "choose_kernels",
    "export",
    "load",
    "load_session",
    "meta_train",
    "profile",
    "quantize",
    "save",
]

#: Module to what it gives to this package.
_PUBLIC = {
    "api": (
        "export",
        "load_session",
        "meta_train",
        "profile",
        "quantize",
    ),
    "artifact": (
        "load",
        "save",
    ),
    "budget": ("Budget",),
    "config": ("Config",),
    "errors": (
        "ArtifactError",
        "ArtifactPathError",
        "BudgetError",
        "ConfigError",
        "DataError",
        "EngineError",
        "ExportError",
        "HQError",
        "HQWarning",
        "KernelError",
        "ModelError",
        "PolicyError",
        "TrainingError",
    ),
    "kernels": ("choose_kernels",),
    "policy": (
        "HybridPolicy",
        "LayerBits",
    ),
    "profiles": ("Profile",),
    "result": ("Result",),
    "session": ("Session",),
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}


if not TYPE_CHECKING:  # for whom a misspelt name would else be an attribute like any other

    def __getattr__(name: str) -> Any:
        """Imports what is public, or a module of the package, when it is first asked for."""
        if name in _HOME:
            value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
        elif not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
            value = importlib.import_module(f"{__name__}.{name}")
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    """Returns the names that are public, imported yet or not."""
    return sorted({*globals(), *__all__})


registration.install()
