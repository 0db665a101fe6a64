"""The user's own measure of a model: `eval_fn`. It is reported and decides nothing.

It is tried on the float model before anything is trained, so that a mistake in it costs no work; if it fails on
what the work gave, that is said, and the work is kept.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from numbers import Real

from torch import Tensor, nn

from hq_plugin.errors import ConfigError, HQWarning
from hq_plugin.modes import in_eval_mode

EvalFunction = Callable[[nn.Module], float]


class Metric:
    """An `eval_fn`, with what it says of the float model; it can be passed on as an `eval_fn`.

    Args:
        eval_fn: The function.
        float_model: The float model, on which it is tried.

    Raises:
        ConfigError: `eval_fn` cannot be called, or did not return one number.
    """

    def __init__(self, eval_fn: EvalFunction, float_model: nn.Module) -> None:
        self._eval_fn, self.of_float = eval_fn, measured(eval_fn, float_model)

    def __call__(self, model: nn.Module) -> float:
        """Calls the function."""
        return self._eval_fn(model)

    @classmethod
    def tried(cls, eval_fn: EvalFunction | None, float_model: nn.Module) -> Metric | None:
        """Returns the metric of an `eval_fn`, which is not tried again if it is one already; None of none."""
        return eval_fn if eval_fn is None or isinstance(eval_fn, cls) else cls(eval_fn, float_model)


def measured(eval_fn: EvalFunction, model: nn.Module) -> float:
    """Returns what `eval_fn` says of a model, which is in eval mode for it and afterwards as it was.

    Raises:
        ConfigError: `eval_fn` cannot be called, or did not return one number.
    """
    if not callable(eval_fn):
        raise ConfigError(f"eval_fn is {eval_fn!r}. It must be a function that takes a model and returns a number.")
    with in_eval_mode(model):
        value: object = eval_fn(model)
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if not isinstance(value, Real) or isinstance(value, bool):
        raise ConfigError(f"eval_fn returned a {type(value).__name__}. It must return one number.")
    return float(value)


def measured_if_possible(eval_fn: EvalFunction | None, model: nn.Module, what: str) -> float | None:
    """Returns the same, or None with a warning where `eval_fn` fails; None where there is none."""
    if eval_fn is None:
        return None
    try:
        return measured(eval_fn, model)
    except Exception as error:  # whatever it is, the work that it would cost is the user's
        warnings.warn(
            f"eval_fn failed on {what}, which has no metric now: {type(error).__name__}: {error}",
            HQWarning,
            stacklevel=3,
        )
        return None
