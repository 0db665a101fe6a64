"""Automatic low-bit hybrid quantization by meta learning, as a plugin for torch.ao.

    import hq_plugin as hq

    small = hq.quantize(model, "3bit", data=loader)
    hq.save(small, "small")

The method is Wang et al., arXiv:2004.11506.
"""

from hq_plugin import registration
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

registration.install()
