"""Two writers at once: locks on files and directories, which end with the process that holds them.

Advisory locks of the operating system (`flock`). Where there are none (Windows, some network file systems), writers
are not kept apart, and files still appear whole or not at all.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Inside, no other process is inside a lock of the same file or directory.

    Args:
        path: A file or directory that exists.
        wait: Whether to wait for another process.

    Raises:
        BlockingIOError: Another process is inside, and `wait` is False.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(handle)


def exchange(first: Path, second: Path) -> bool:
    """Exchanges two directories in one step, so that both names exist at any moment; False where it cannot.

    `renameat2` of Linux, which Python has no name for.
    """
    import ctypes

    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, flags = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(rename(here, os.fsencode(first), here, os.fsencode(second), flags) == 0)
