"""The exceptions and the warning of hq_plugin, and nothing else.

Each also derives from the standard exception that a caller would expect, so `except ValueError`
works for people who do not know this library.
"""

from __future__ import annotations


class HQError(Exception):
    """Base of every error that hq_plugin raises on purpose."""


class BudgetError(HQError, ValueError):
    """A budget that cannot be parsed, is not positive, or cannot be met."""


class ModelError(HQError, ValueError):
    """A model that cannot be quantized as it stands, or that does not fit an artifact or session."""


class DataError(HQError, ValueError):
    """Data that is empty, one-shot, not finite, of the wrong shape or without values (meta device)."""


class ConfigError(HQError, ValueError):
    """An option that does not exist or has a value outside what is possible."""


class PolicyError(HQError, ValueError):
    """A policy that does not fit the model or the search space."""


class TrainingError(HQError, RuntimeError):
    """Training that cannot go on, such as a loss that is not finite."""


class ArtifactError(HQError, ValueError):
    """A saved model or session that is damaged, foreign, or of a newer format."""


class ArtifactPathError(HQError, OSError):
    """A directory that cannot be written to or that holds something else."""


class KernelError(HQError, ValueError):
    """A kernel that does not exist, or a model that has nothing to run on one."""


class ExportError(HQError, RuntimeError):
    """A model that cannot be written for another runtime; the message names the operator or the layer."""


class EngineError(HQError, ImportError):
    """What a target or an integration runs on is not installed; the message says how to install it."""


class HQWarning(UserWarning):
    """Something works, but not as well as it could; the message says what to do."""
