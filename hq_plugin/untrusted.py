"""What a file from a stranger may cost and be: bounded memory and time, the declared types, and clean errors.

`storage.py` reads files with it, `artifact.py` and `session_store.py` build models with it. Checksums tell damage;
what is here holds where somebody made the checksums right.
"""

from __future__ import annotations

import os
import stat
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from hq_plugin.errors import ArtifactError, HQError

#: What reading and building raise for content that is not what it says it is.
_DAMAGE = (
    KeyError,
    TypeError,
    AttributeError,
    ValueError,
    IndexError,
    ArithmeticError,
    RuntimeError,
    MemoryError,
    AssertionError,
    RecursionError,
)


@contextmanager
def clean_errors(what: str | Path) -> Iterator[None]:
    """Turns whatever damaged content makes Python and torch raise into an `ArtifactError` that names `what`."""
    try:
        yield
    except HQError:
        raise
    except _DAMAGE as error:
        text = " ".join(str(error).split())[:300]
        raise ArtifactError(f"{what} is damaged: {type(error).__name__}: {text}") from error


def read_file(path: Path, limit: int | None = None) -> bytes:
    """Reads a regular file, at most as long as it was when it was opened.

    Args:
        path: The file, or a link to one. A pipe or a device, which may block or never end, is an error.
        limit: Most bytes.

    Raises:
        OSError: It cannot be read, is not a regular file, or is longer.
    """
    # Not blocking, since opening a pipe would wait for its writer.
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError("it is not a regular file")
        if limit is not None and status.st_size > limit:
            raise OSError(f"it has {status.st_size:,} bytes; no such file of ours has more than {limit:,}")
        return file.read(status.st_size)


@contextmanager
def at_most(elements: int, tensors: int) -> Iterator[None]:
    """Inside, modules that register more than so many elements or tensors are an `ArtifactError`.

    A description of a few bytes may ask for layers of terabytes; torch reserves memory for a tensor without
    touching it, so that counting when it is registered is early enough.
    """
    left = [elements, tensors]

    def count(module: nn.Module, name: str, tensor: Any) -> None:
        if isinstance(tensor, torch.Tensor):
            left[0] -= tensor.numel()
            left[1] -= 1
            if min(left) < 0:
                raise ArtifactError(
                    f"The description asks for a larger model than the file holds: more than {elements:,} elements "
                    f"in {tensors:,} tensors. It is damaged, or was made to exhaust memory."
                )

    handles = [
        torch_module.register_module_parameter_registration_hook(count),
        torch_module.register_module_buffer_registration_hook(count),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def build_at_most(build: Callable[[], nn.Module], elements: int, tensors: int) -> nn.Module:
    """Builds a model of bounded size: first without memory for its values, then in earnest."""
    with at_most(elements, tensors), torch.device("meta"):
        build()
    # What is within the bounds may be begun twice in earnest: see `adapters.without_memory`.
    with at_most(2 * elements, 2 * tensors):
        return build()


def check_types(instance: Any) -> None:
    """Compares the fields of a dataclass that was filled from JSON with their annotations.

    Raises:
        TypeError: A field has a value of another type; the message names it.
    """
    hints = typing.get_type_hints(type(instance))
    for field in fields(instance):
        value = getattr(instance, field.name)
        if not _conforms(value, hints[field.name]):
            raise TypeError(f"{field.name} is {str(value)[:80]!r}, a {type(value).__name__}")


def _conforms(value: Any, hint: Any) -> bool:
    """Whether a value has the type of an annotation, of the kinds that our dataclasses use."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or isinstance(hint, typing.TypeVar):
        return True
    if origin in (types.UnionType, typing.Union):
        return any(_conforms(value, argument) for argument in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin is Callable:
        return callable(value)
    if origin is tuple and arguments[-1:] == (Ellipsis,):
        return isinstance(value, tuple) and all(_conforms(part, arguments[0]) for part in value)
    if origin is tuple:
        return (
            isinstance(value, tuple)
            and len(value) == len(arguments)
            and all(_conforms(part, argument) for part, argument in zip(value, arguments, strict=True))
        )
    if origin in (list, Sequence):
        return isinstance(value, list) and all(_conforms(part, arguments[0]) for part in value)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping) and all(
            _conforms(key, arguments[0]) and _conforms(part, arguments[1]) for key, part in value.items()
        )
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if is_dataclass(value):
        check_types(value)
    return hint is types.NoneType and value is None if hint is types.NoneType else isinstance(value, hint)


__all__ = ["at_most", "build_at_most", "check_types", "clean_errors", "read_file"]
