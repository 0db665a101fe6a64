"""Automatic low-bit hybrid quantization by meta learning, as a plugin for torch.ao.

    import hq_plugin as hq

    small = hq.quantize(model, "3bit", data=loader)
    hq.save(small, "small")

The method is Wang et al., arXiv:2004.11506.
"""

from hq_plugin import registration
from hq_plugin.api import load_session, meta_train, quantize
from hq_plugin.artifact import load, save
from hq_plugin.budget import Budget
from hq_plugin.config import Config
from hq_plugin.errors import (
    ArtifactError,
    ArtifactPathError,
    BudgetError,
    ConfigError,
    DataError,
    HQError,
    HQWarning,
    ModelError,
    PolicyError,
    TrainingError,
)
from hq_plugin.policy import HybridPolicy, LayerBits
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
    "HQError",
    "HQWarning",
    "HybridPolicy",
    "LayerBits",
    "ModelError",
    "PolicyError",
    "Result",
    "Session",
    "TrainingError",
    "__version__",
    "load",
    "load_session",
    "meta_train",
    "quantize",
    "save",
]

registration.install()
