"""Several forwards side by side: each waits at chosen modules until the others are there or will not come.

So what one network computes there can be compared with what another does, on all batches, before either goes on:
nothing is kept but what the forwards themselves hold. Each runs in a thread of its own, and only one at a time.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import nn

from hq_plugin.batch import first_input

K = TypeVar("K")


class _Ended(BaseException):
    """Raised in a forward that is not needed any more; models catch no such thing."""


class _Forward:
    """A forward that runs until it meets a module, and waits there.

    Attributes:
        name: The module where it waits; None once it has ended.
        value: What the module was called with first.
        error: What it died of.
    """

    def __init__(self, run: Callable[[], Any]) -> None:
        self.name: str | None = None
        self.value: Any = None
        self.error: BaseException | None = None
        self._run, self._ending = run, False
        self._turn, self._main = threading.Semaphore(0), threading.Semaphore(0)
        # Which are a thread's own, as is whether gradients are computed.
        self._default = torch.get_default_device()
        self._device = torch.cuda.current_device() if torch.cuda.is_available() else None
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._body,), daemon=True)

    def go(self) -> None:
        """Lets it run until it waits again, or ends."""
        self.name = self.value = None
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._turn.release()
        self._main.acquire()

    def end(self) -> None:
        """Ends it where it waits, or comes to next."""
        self._ending = True
        self._turn.release()
        if self._thread.ident is not None:
            self._thread.join()

    def wait(self, name: str, value: Any) -> None:
        """Called in its thread: gives the turn away, until it is its turn again."""
        self.name, self.value = name, value
        self._main.release()
        self._turn.acquire()
        if self._ending:
            raise _Ended

    def is_current(self) -> bool:
        """Whether the code that asks runs in it."""
        return threading.get_ident() == self._thread.ident

    def _body(self) -> None:
        try:
            if self._device is not None:
                torch.cuda.set_device(self._device)
            with torch.no_grad(), self._default if self._default.type != "cpu" else nullcontext():
                self._run()
        except _Ended:
            pass
        except BaseException as error:  # raised where it was asked for
            self.error = error
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
        forwards: By a key each, a network and what runs it; several may run the same one.
        names: Modules of these networks, about in the order in which they run. Every forward waits at each of them
            once, where it comes to it; the first at which any waits is where they meet next.
        meet: Called with a module's name and what those forwards that have come to it call it with first, before
            they go on. It may change the module.

    Raises:
        Exception: What a forward or `meet` raised; all others are ended.
    """
    order = {name: number for number, name in enumerate(names)}
    met: set[str] = set()
    running = {key: _Forward(run) for key, (_, run) in forwards.items()}
    networks: dict[int, nn.Module] = {id(network): network for network, _ in forwards.values()}

    def hook(name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            current = next((forward for forward in running.values() if forward.is_current()), None)
            if name not in met and current is not None and (args or kwargs):
                current.wait(name, first_input(args, kwargs))

        return see

    handles = [
        network.get_submodule(name).register_forward_pre_hook(hook(name), with_kwargs=True)
        for network in networks.values()
        for name in order
    ]
    try:
        _advance(running.values())
        while waited_at := {forward.name for forward in running.values() if forward.name is not None}:
            name = min(waited_at, key=order.__getitem__)
            there = {key: forward for key, forward in running.items() if forward.name == name}
            meet(name, {key: forward.value for key, forward in there.items()})
            met.add(name)
            if len(met) == len(order):
                break  # what comes after is not needed
            _advance(there.values())
    finally:
        for forward in running.values():
            forward.end()
        for handle in handles:
            handle.remove()


def _advance(forwards: Iterable[_Forward]) -> None:
    for forward in forwards:
        forward.go()
        if forward.error is not None:
            raise forward.error
