"""Several forwards side by side: each waits at chosen modules until the others are there or will not come.

So what one network computes there can be compared with what another does, on all batches, before either goes on:
nothing is kept but what the forwards themselves hold. Each runs in a thread of its own, and only one at a time.
They share what is the process's; a lock that a forward holds over one of the modules would never come free.
"""

from __future__ import annotations

import contextvars
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import nn

from hq_plugin.batch import first_input
from hq_plugin.seeding import Randomness

K = TypeVar("K")


class _Ended(BaseException):
    """Raised in a forward that is not needed any more."""


class _Forward:
    """A forward that runs until it meets a module, and waits there.

    Each goes on from the randomness at its own last step, and all begin with the same: what two networks draw at
    random in eval mode is alike.

    Attributes:
        name: The module where it waits; None before it has begun and once it has ended.
        value: What the module was called with first.
    """

    def __init__(self, run: Callable[[], Any]) -> None:
        self.name: str | None = None
        self.value: Any = None
        self._run, self._ending = run, False
        self._error: BaseException | None = None
        self._turn, self._main = threading.Semaphore(0), threading.Semaphore(0)
        self._randomness = Randomness()
        # Which are a thread's own, as is whether gradients are computed.
        self._default = torch.get_default_device()
        self._device = torch.cuda.current_device() if torch.cuda.is_available() else None
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._body,), daemon=True)

    def go(self) -> None:
        """Lets it run until it waits again, or ends; raises what it died of."""
        self.name = self.value = None
        before = Randomness()
        self._randomness.put_back()
        try:
            if self._thread.ident is None:
                self._thread.start()
            else:
                self._turn.release()
            self._main.acquire()
            self._randomness = Randomness()
        finally:
            before.put_back()
        if self._error is not None:
            error, self._error = self._error, None
            try:
                raise error
            finally:
                del error  # whose traceback holds this frame

    def end(self) -> None:
        """Lets it end where it waits, or comes to next; `join` waits for that."""
        self._ending = True
        self._turn.release()

    def join(self) -> None:
        """Waits for its end."""
        if self._thread.ident is not None:
            self._thread.join()

    def wait(self, name: str, value: Any) -> None:
        """Called in its thread: gives the turn away, until it is its turn again."""
        if not self._ending:
            self.name, self.value = name, value
            self._main.release()
            self._turn.acquire()
        if self._ending:
            raise _Ended

    def _body(self) -> None:
        try:
            if self._device is not None:
                torch.cuda.set_device(self._device)
            with torch.no_grad(), self._default if self._default.type != "cpu" else nullcontext():
                self._run()
        except _Ended:
            pass
        except BaseException as error:  # raised where it was asked for
            self._error = error
        finally:
            self.name = self.value = None
            self._main.release()


def in_lockstep(
    forwards: Mapping[K, tuple[nn.Module, Callable[[], Any]]],
    names: Iterable[str],
    meet: Callable[[str, dict[K, Any]], None],
) -> None:
    """Runs forwards side by side, without gradients.

    Args:
        forwards: By a key each, a network, which is its own, and what runs it.
        names: Modules of these networks, about in the order in which they run. Forwards that come to one wait
            there; the first in this order at which any waits is where they meet next. Who comes later goes on.
        meet: Called with a module's name and what those forwards that have come to it call it with first, before
            they go on. It may change the module.

    Raises:
        Exception: What a forward or `meet` raised; all others are ended.
    """
    order = {name: number for number, name in enumerate(names)}
    if not order:
        return
    met: set[str] = set()
    running = {key: _Forward(run) for key, (_, run) in forwards.items()}

    def hook(forward: _Forward, name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name not in met and (args or kwargs):
                forward.wait(name, first_input(args, kwargs))

        return see

    handles = [
        network.get_submodule(name).register_forward_pre_hook(hook(running[key], name), with_kwargs=True)
        for key, (network, _) in forwards.items()
        for name in order
    ]
    try:
        with _process_kept():
            try:
                _run(running, order, meet, met)
            finally:
                for forward in running.values():
                    forward.end()
                for forward in running.values():
                    forward.join()
    finally:
        for handle in handles:
            handle.remove()


def _run(
    running: Mapping[K, _Forward],
    order: Mapping[str, int],
    meet: Callable[[str, dict[K, Any]], None],
    met: set[str],
) -> None:
    for forward in running.values():
        forward.go()
    while waited_at := {forward.name for forward in running.values() if forward.name is not None}:
        name = min(waited_at, key=order.__getitem__)
        there = {key: forward for key, forward in running.items() if forward.name == name}
        meet(name, {key: forward.value for key, forward in there.items()})
        met.add(name)
        if len(met) == len(order):
            return  # what comes after is not needed
        for forward in there.values():
            forward.go()


@contextmanager
def _process_kept() -> Iterator[None]:
    """Afterwards the process is as it was: forwards that put back what they found do so in any order."""
    cuda = torch.backends.cuda
    attention = {
        cuda.enable_flash_sdp: cuda.flash_sdp_enabled(),
        cuda.enable_mem_efficient_sdp: cuda.mem_efficient_sdp_enabled(),
        cuda.enable_math_sdp: cuda.math_sdp_enabled(),
        cuda.enable_cudnn_sdp: cuda.cudnn_sdp_enabled(),
    }
    dtype = torch.get_default_dtype()
    try:
        with warnings.catch_warnings():
            yield
    finally:
        torch.set_default_dtype(dtype)
        for enable, enabled in attention.items():
            enable(enabled)
