"""Randomness that follows from a seed, and leaves the caller's alone: torch's, NumPy's and Python's.

Workers of a DataLoader take their seeds from torch's, so that they follow as well. Threads have one randomness, and
share the network of a session: they take turns.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

#: Held by the thread whose turn it is.
_TURN = threading.RLock()


class Randomness:
    """Where all global randomness stands: torch's on every device, NumPy's and Python's."""

    def __init__(self) -> None:
        self._torch = torch.get_rng_state()
        self._cuda: list[torch.Tensor] = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        self._numpy: Any = np.random.get_state()
        self._python = random.getstate()

    def put_back(self) -> None:
        """Goes on from there."""
        torch.set_rng_state(self._torch)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)
        np.random.set_state(self._numpy)
        random.setstate(self._python)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, all global randomness follows from `seed`; outside, the caller's is untouched.

    Of several threads one at a time is inside; the others wait.
    """
    with _TURN:
        before = Randomness()
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            before.put_back()


__all__ = ["Randomness", "seeded"]
