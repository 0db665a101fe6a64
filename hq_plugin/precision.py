"""Mixed precision, as accelerate is configured (`accelerate config`, or ACCELERATE_MIXED_PRECISION=bf16)."""

from __future__ import annotations

from contextlib import AbstractContextManager

from accelerate import Accelerator


def autocast() -> AbstractContextManager[None]:
    """Returns a context in which forwards run in the precision that accelerate is configured for."""
    context: AbstractContextManager[None] = Accelerator().autocast()
    return context
