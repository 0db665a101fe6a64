"""Randomness that follows from a seed, and leaves the caller's alone: torch's, NumPy's and Python's.

Workers of a DataLoader take their seeds from torch's, so that they follow as well. Threads have one randomness, and
share the network of a session: they take turns.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

#: Held by the thread whose turn it is.
_TURN = threading.RLock()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, all global randomness follows from `seed`; outside, the caller's is untouched.

    Of several threads one at a time is inside; the others wait.
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with _TURN, torch.random.fork_rng(devices=devices):
        python, numpy = random.getstate(), np.random.get_state()
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


__all__ = ["seeded"]
