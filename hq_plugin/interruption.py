"""Ctrl-C: the step that is under way is finished and kept, and the error says how to go on.

Work that can be kept at some moments only runs inside `deferred` and asks there whether it should stop. Whoever
stops raises a `KeyboardInterrupt` with a message, which nothing on the way catches.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Interruption:
    """Whether the user has pressed Ctrl-C.

    Attributes:
        wanted: Set by the first Ctrl-C; a second one interrupts at once.
    """

    def __init__(self) -> None:
        self.wanted = False


@contextmanager
def deferred() -> Iterator[Interruption]:
    """Inside, the first Ctrl-C waits for whoever asks for it.

    Outside the main thread, or where somebody else handles the signal, nothing changes.
    """
    asked = Interruption()

    def ask(*_: object) -> None:
        asked.wanted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # Not print: a signal may come in the middle of one.
        os.write(2, b"\nInterrupted: this step is finished and kept. Ctrl-C again stops at once.\n")

    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield asked
        return
    signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def interrupted(stage: str, kept_in: Path | None) -> KeyboardInterrupt:
    """Returns what to raise, with what was kept and how to go on."""
    if kept_in is None:
        return KeyboardInterrupt(
            f"Interrupted in {stage}. Nothing was kept: checkpoint_dir=... keeps what is done."
        )
    return KeyboardInterrupt(
        f"Interrupted in {stage}. What was done is kept in {kept_in}; the same call goes on from there."
    )


__all__ = ["Interruption", "deferred", "interrupted"]
