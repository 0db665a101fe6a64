"""One batch of any kind: a tensor, a tuple or a dict becomes arguments of the model, labels and a size.

Labels are recognised and kept apart; they are never needed, the float model is the teacher.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hq_plugin.config import Config
from hq_plugin.distribution import lost_process
from hq_plugin.errors import DataError, HQError
from hq_plugin.memory import out_of_memory

LABEL_KEYS = ("labels", "label", "targets", "target", "y")

Split = tuple[tuple[Any, ...], dict[str, Any], Tensor | None]


@dataclass(frozen=True)
class Batch:
    """One batch, ready for `model(*args, **kwargs)`.

    Attributes:
        args: Positional inputs.
        kwargs: Keyword inputs.
        labels: Class labels of shape `[samples]`, where there are any.
        size: Number of samples.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    labels: Tensor | None
    size: int

    def run(self, model: nn.Module) -> Any:
        """Runs a model on this batch; of padded sequences the output keeps the tokens that count.

        Raises:
            DataError: The model cannot take these inputs; the message gives their shapes.
        """
        return self.without_padding(self.run_whole(model))

    def run_whole(self, model: nn.Module) -> Any:
        """Runs a model on this batch; what it says of padding is in the output.

        Raises:
            DataError: As for `run`.
        """
        try:
            # On copies: a model may change its inputs in place, and another one reads them after it.
            args, kwargs = _map((self.args, self.kwargs), Tensor.clone)
            return model(*args, **kwargs)
        except HQError:
            raise
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
            if out_of_memory(error) or lost_process(error):
                raise
            named = [*enumerate(self.args), *self.kwargs.items()]
            shapes = {name: tuple(value.shape) for name, value in named if isinstance(value, Tensor)}
            other = {str(v.dtype).removeprefix("torch.") for _, v in named if isinstance(v, Tensor)} - {"float32"}
            of = f" and the types {', '.join(sorted(other))}" if other else ""
            if "more than 1 value per channel" in str(error):
                raise DataError(
                    "A batch of one sample has no variance, by which BatchNorm's statistics are re-estimated: pass "
                    "batches of two or more."
                ) from error
            raise DataError(
                f"The model cannot run on a batch whose inputs have the shapes {shapes}{of}: {error}. Pass batches "
                "that the model takes, or prepare_batch=... if inputs and labels were told apart wrongly."
            ) from error

    # Found once: a GPU is waited for each time that it is asked whether a mask masks anything.
    @cached_property
    def kept(self) -> Tensor | None:
        """Which positions of padded sequences count, bool `[samples, tokens]`; None where all do."""
        return self._kept_by("attention_mask")

    @cached_property
    def _decoded(self) -> Tensor | None:
        return self._kept_by("decoder_attention_mask") if "decoder_attention_mask" in self.kwargs else self.kept

    def _kept_by(self, name: str) -> Tensor | None:
        mask = self.kwargs.get(name)
        if not isinstance(mask, Tensor) or mask.dim() != 2 or bool(mask.all()):
            return None
        return mask.bool()

    def without_padding(self, output: Any, name: str = "") -> Any:
        """Drops the positions of an output `[samples, tokens, ...]` that `attention_mask` masks.

        What a model says of padding is never used: a loss over it would be spent on nothing. Where there is a
        `decoder_attention_mask`, it is what masks all that no encoder gave.

        Args:
            output: The output, or parts of it.
            name: Of the module that gave it: an encoder is known by its name, as its parts of an output are.
        """
        if self.kept is None and self._decoded is None:
            return output

        def of(value: Any, name: str) -> Any:
            if isinstance(value, Tensor):
                mask = self.kept if "encoder" in name.replace("_", ".").split(".") else self._decoded
                return value if mask is None or value.dim() < 3 or value.shape[:2] != mask.shape else value[mask]
            if isinstance(value, Mapping):
                return {key: of(part, f"{name}.{key}") for key, part in value.items()}
            return [of(part, name) for part in value] if isinstance(value, (tuple, list)) else value

        return of(output, name)

    def take(self, count: int) -> Batch:
        """Returns the first `count` samples."""
        return self if count >= self.size else self.part(0, count)

    @torch.no_grad()
    def taken_by(self, model: nn.Module, count: int) -> Batch:
        """Returns the first `count` samples, or all of them where a model does not run on a part of a batch.

        Nodes of a graph come with their edges, and sequences may begin with time: rows are no samples there.

        Args:
            model: Runs once on the part, in eval mode.
            count: How many samples are wanted.
        """
        part = self.take(count)
        if part is not self:
            try:
                part.run_whole(model)
            except DataError:
                return self
        return part

    def part(self, start: int, stop: int) -> Batch:
        """Returns some samples: of every tensor whose first dimension is that of the samples."""

        def cut(tensor: Tensor) -> Tensor:
            return tensor[start:stop] if tensor.dim() and tensor.shape[0] == self.size else tensor

        args, kwargs, labels = _map((self.args, self.kwargs, self.labels), cut)
        return Batch(args, kwargs, labels, stop - start)

    def to(self, device: torch.device) -> Batch:
        """Returns the batch on a device."""
        args, kwargs, labels = _map((self.args, self.kwargs, self.labels), lambda t: t.to(device))
        return Batch(args, kwargs, labels, self.size)


def make_batch(raw: Any, split: Callable[[Any], Split]) -> Batch:
    """Splits and checks one batch.

    Raises:
        DataError: It holds no tensor, no sample, values that are not finite, or no values at all.
    """
    parts = split(raw)
    if not isinstance(parts, tuple) or len(parts) != 3:
        raise DataError(
            f"prepare_batch returned a {type(parts).__name__}. It must return three things: the model's inputs as "
            "a tuple, its named inputs as a dict, and the labels or None."
        )
    args, kwargs, labels = parts
    tensors = _tensors((args, kwargs))
    if not tensors and any(
        isinstance(part, np.ndarray) for part in (raw if isinstance(raw, (tuple, list)) else [raw])
    ):
        raise DataError("A batch holds numpy arrays: turn each into a tensor by torch.from_numpy.")
    if not tensors:
        raise DataError(
            f"A batch of type {type(raw).__name__} holds no tensor. A batch is a tensor, a tuple of them, "
            "or a dict of model inputs; prepare_batch=... splits any other kind."
        )
    for tensor in tensors:
        if tensor.is_meta:
            raise DataError("A batch is on the meta device, which holds no values. Load real data.")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = ~torch.isfinite(tensor)
            first = int(bad.flatten(1).any(1).nonzero()[0]) if tensor.dim() > 1 else int(bad.nonzero()[0])
            where = f"sample {first} of an input of shape {tuple(tensor.shape)}"
            raise DataError(f"A batch holds NaN or infinity: {where}. Clean the data first.")
    size = next((tensor.shape[0] for tensor in tensors if tensor.dim()), 1)
    if size == 0:
        raise DataError("A batch holds no sample (its first dimension is 0). Drop empty batches.")
    return Batch(tuple(args), dict(kwargs), labels, size)


def batch_splitter(model: nn.Module, config: Config) -> Callable[[Any], Split]:
    """Returns what tells a batch's inputs from its labels: `prepare_batch`, or the usual rules."""
    return config.prepare_batch or _Splitter(model)


def label_names(model: nn.Module) -> list[str]:
    """Returns the names under which labels go, but for inputs that a model's forward needs.

    What a loss is computed from where it is given has a default (transformers' `labels=None`): it is a label.
    """
    parameters = inspect.signature(model.forward).parameters.values()
    needed = {p.name for p in parameters if p.default is inspect.Parameter.empty}
    return [name for name in LABEL_KEYS if name not in needed]


#: Names of parameters that take one whole number a sample, which is no label.
_LENGTHS = re.compile(r"(^|_)(lens?|lengths?|offsets?)(_|$)", re.IGNORECASE)


class _Splitter:
    """Tells inputs from labels by the rules that most pipelines follow.

    A dict goes in by keyword, without `labels`, `label`, `targets`, `target` and `y` unless `forward`
    needs them. The last element of a tuple is a label if `forward` takes fewer inputs, or if it can do without it
    and it is one whole number a sample, while the first is floating point or has several a sample; not where it
    would go to a parameter that asks for lengths.
    """

    def __init__(self, model: nn.Module) -> None:
        parameters = inspect.signature(model.forward).parameters.values()
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self.labels = label_names(model)
        inputs = [p for p in parameters if p.kind in positional]
        self.lengths = [_LENGTHS.search(p.name) is not None for p in inputs]
        self.takes, self.needs = len(inputs), sum(p.default is inspect.Parameter.empty for p in inputs)
        self.takes_any = any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters)

    def __call__(self, raw: Any) -> Split:
        if isinstance(raw, Tensor):
            return (raw,), {}, None
        if isinstance(raw, Mapping):
            kwargs = {k: v for k, v in raw.items() if k not in self.labels}
            labels = next((raw[k] for k in self.labels if isinstance(raw.get(k), Tensor)), None)
            return (), kwargs, labels
        if isinstance(raw, (tuple, list)):
            args = tuple(raw)
            at = len(args) - 1
            asked_for = at < self.takes and self.lengths[at]
            if len(args) > max(1, self.needs) and (
                (_is_label(args) and not asked_for) or (len(args) > self.takes and not self.takes_any)
            ):
                last = args[-1]
                return args[:-1], {}, last if _is_label(args) else None
            return args, {}, None
        return (raw,), {}, None


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Returns what a layer was called with first, by position or by name."""
    return args[0] if args else next(iter(kwargs.values()))


def _is_label(args: tuple[Any, ...]) -> bool:
    first, last = args[0], args[-1]
    return (
        isinstance(last, Tensor)
        and not last.is_floating_point()
        and last.dim() == 1
        and isinstance(first, Tensor)
        and (first.is_floating_point() or first.dim() > 1)
        and first.shape[:1] == last.shape
    )


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _map(value, found.append)
    return found


def _map(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """Applies a function to every tensor in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (tuple, list)):
        return type(value)([_map(part, function) for part in value]) if type(value) in (tuple, list) else value
    if isinstance(value, Mapping):
        return {key: _map(part, function) for key, part in value.items()}
    return value
