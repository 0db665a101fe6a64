"""Batches of any kind, checked, split into training and held-out data.

A batch may be a tensor, a tuple or a dict. Labels are recognised and kept apart; they are never
needed, the float model is the teacher. Data that does not exist is made in `synthetic.py`.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from hq_plugin.config import Config
from hq_plugin.distribution import lost_process
from hq_plugin.errors import DataError, HQError, HQWarning
from hq_plugin.memory import out_of_memory

LABEL_KEYS = ("labels", "label", "targets", "target", "y")
#: Leaders of the search are re-ranked on this many times the samples that score a candidate.
RERANK_FACTOR = 4
#: Samples below which what is held out says little.
FEW = 16

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
        try:
            return self.without_padding(model(*self.args, **self.kwargs))
        except HQError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
            if out_of_memory(error) or lost_process(error):
                raise
            named = [*enumerate(self.args), *self.kwargs.items()]
            shapes = {name: tuple(value.shape) for name, value in named if isinstance(value, Tensor)}
            other = {str(v.dtype).removeprefix("torch.") for _, v in named if isinstance(v, Tensor)} - {"float32"}
            of = f" and the types {', '.join(sorted(other))}" if other else ""
            raise DataError(
                f"The model cannot run on a batch whose inputs have the shapes {shapes}{of}: {error}. Pass batches "
                "that the model takes, or prepare_batch=... if inputs and labels were told apart wrongly."
            ) from error

    @property
    def kept(self) -> Tensor | None:
        """Which positions of padded sequences count, bool `[samples, tokens]`; None where all do."""
        mask = self.kwargs.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.dim() != 2 or bool(mask.all()):
            return None
        return mask.bool()

    def without_padding(self, output: Any) -> Any:
        """Drops the positions of an output `[samples, tokens, ...]` that `attention_mask` masks.

        What a model says of padding is never used: a loss over it would be spent on nothing.
        """
        kept = self.kept
        if kept is None:
            return output

        def of(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value[kept] if value.dim() > 2 and value.shape[:2] == kept.shape else value
            if isinstance(value, Mapping):
                return {name: of(part) for name, part in value.items()}
            return [of(part) for part in value] if isinstance(value, (tuple, list)) else value

        return of(output)

    def take(self, count: int) -> Batch:
        """Returns the first `count` samples."""
        return self if count >= self.size else self.part(0, count)

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


@dataclass(frozen=True)
class Data:
    """Training batches, which can be read again and again, and held-out batches in memory.

    Attributes:
        train: Training data; each `iter` is one epoch.
        holdout: Batches that training never sees (unless `shared` says otherwise).
        shared: There was too little data to hold any out: both are the same.
        synthetic: The data was made up, since none was given.
    """

    train: Iterable[Batch]
    holdout: list[Batch]
    shared: bool = False
    synthetic: bool = False

    def forever(self) -> Iterator[Batch]:
        """Yields training batches without end, epoch after epoch, in an order that only the seed decides."""
        for epoch in count():
            empty = True
            for batch in self.train.epoch(epoch) if isinstance(self.train, _Batches) else self.train:
                empty = False
                yield batch
            if empty:
                raise DataError("data ended: a second pass over it gave no batch. Pass a list or a Dataset.")


def prepare_data(data: Any, model: nn.Module, config: Config) -> Data:
    """Reads what a user may pass as data.

    Args:
        data: An iterable of batches that can be read more than once, a DataLoader, or a Dataset.
        model: The model that will run on it; its signature tells inputs from labels.
        config: Gives the seed, the batch size for a Dataset, and how much is held out.

    Raises:
        DataError: The data is empty, one-shot, not finite, not batches, or without values.
    """
    read = _read(data, model, config)
    _warn_if_few(read)
    return read


def _warn_if_few(data: Data) -> None:
    """Warns where what is held out says little; sequences of tokens are many samples each."""
    held = sum(batch.size for batch in data.holdout)
    first = next((value for batch in data.holdout for value in _tensors((batch.args, batch.kwargs))), None)
    if data.shared:
        what = f"Nothing could be held out of so little data: the {held} samples that train also measure"
    elif held < FEW and first is not None and first.is_floating_point():
        what = f"Only {held} samples are held out to measure"
    else:
        return
    warnings.warn(
        f"{what} how close the result is, which will look better than it is. A few hundred samples, in several "
        "batches, are enough, and need no labels.",
        HQWarning,
        stacklevel=4,
    )


def _read(data: Any, model: nn.Module, config: Config) -> Data:
    split = batch_splitter(model, config)
    wanted = config.steps.holdout * RERANK_FACTOR
    if isinstance(data, DataLoader) and not isinstance(data.dataset, IterableDataset):
        if data.batch_size is None:
            return _from_batches(data, split, wanted)
        return _from_dataset(data.dataset, data.batch_size, split, wanted, config.seed, data)
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        return _from_dataset(data, config.filled().batch_size or 1, split, wanted, config.seed, None)
    if isinstance(data, str):
        raise DataError(
            f"data is the string {data[:80]!r}, not batches. Pictures are read by torchvision's ImageFolder, "
            "a text by open(...).read(), of which a language model takes a list; the command line takes paths."
        )
    if isinstance(data, np.ndarray):
        raise DataError("data is a numpy array, not batches: pass torch.from_numpy(data).split(64).")
    if isinstance(data, (bytes, Mapping, Tensor)) or not isinstance(data, Iterable):
        raise DataError(
            f"data is a {type(data).__name__}, not batches. Pass a list of batches (tensor, tuple or "
            "dict), a DataLoader or a Dataset; one tensor of inputs becomes batches by x.split(64)."
        )
    if iter(data) is data:
        raise DataError(
            "data is a one-shot iterator (a generator, say): it can be read once, and training reads it "
            "many times. Pass list(data), a DataLoader or a Dataset."
        )
    return _from_batches(data, split, wanted)


def _from_dataset(
    dataset: Any,
    batch_size: int,
    split: Callable[[Any], Split],
    wanted: int,
    seed: int,
    like: DataLoader | None,
) -> Data:
    total = len(dataset)
    if total == 0:
        raise DataError("data is empty: the Dataset has no samples.")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()
    held = min(wanted, total // 4)
    options: dict[str, Any] = {"batch_size": batch_size}
    if like is not None:
        options |= {"collate_fn": like.collate_fn, "num_workers": like.num_workers}
        options |= {"worker_init_fn": like.worker_init_fn}
    train_order = order[held:]
    generator = torch.Generator()
    loader = DataLoader(
        Subset(dataset, train_order),
        shuffle=True,
        # A last, smaller batch would upset BatchNorm; it is dropped unless it is the only one.
        drop_last=len(train_order) >= batch_size,
        generator=generator,
        **options,
    )
    held_loader = DataLoader(Subset(dataset, order[:held] if held else order), **options)
    holdout = [make_batch(raw, split) for raw in held_loader]
    return Data(_Batches(loader, split, shuffle=(generator, seed)), holdout, shared=held == 0)


def _from_batches(data: Iterable[Any], split: Callable[[Any], Split], wanted: int) -> Data:
    limit = max(len(data) // 4, 1) if isinstance(data, Sized) else None
    holdout: list[Batch] = []
    more = False
    for raw in data:
        full = sum(batch.size for batch in holdout) >= wanted or (limit is not None and len(holdout) >= limit)
        if full:
            more = True
            break
        holdout.append(make_batch(raw, split))
    if not holdout:
        raise DataError("data is empty: it gave no batch.")
    skip = len(holdout) if more else 0
    return Data(_Batches(data, split, skip), holdout, shared=not more)


class _Batches:
    """Checked batches of a re-iterable source, without its first `skip` ones.

    A source that shuffles by a generator of ours is seeded anew for each epoch: what a stage of training sees
    does not hang on what was read before it.
    """

    def __init__(
        self,
        source: Iterable[Any],
        split: Callable[[Any], Split],
        skip: int = 0,
        shuffle: tuple[torch.Generator, int] | None = None,
    ) -> None:
        self.source, self.split, self.skip, self.shuffle = source, split, skip, shuffle

    def __iter__(self) -> Iterator[Batch]:
        return self.epoch(0)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yields the batches of an epoch."""
        if self.shuffle is not None:
            generator, seed = self.shuffle
            generator.manual_seed(hash((seed, epoch)) & 0x7FFFFFFF)
        for number, raw in enumerate(self.source):
            if number >= self.skip:
                yield make_batch(raw, self.split)


def make_batch(raw: Any, split: Callable[[Any], Split]) -> Batch:
    """Splits and checks one batch.

    Raises:
        DataError: It holds no tensor, no sample, values that are not finite, or no values at all.
    """
    args, kwargs, labels = split(raw)
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
            raise DataError("A batch holds NaN or infinity. Clean the data first.")
    size = tensors[0].shape[0] if tensors[0].dim() else 1
    if size == 0:
        raise DataError("A batch holds no sample (its first dimension is 0). Drop empty batches.")
    return Batch(tuple(args), dict(kwargs), labels, size)


def batch_splitter(model: nn.Module, config: Config) -> Callable[[Any], Split]:
    """Returns what tells a batch's inputs from its labels: `prepare_batch`, or the usual rules."""
    return config.prepare_batch or _Splitter(model)


class _Splitter:
    """Tells inputs from labels by the rules that most pipelines follow.

    A dict goes in by keyword, without `labels`, `label`, `targets`, `target` and `y` unless `forward`
    names them. The last element of a tuple is a label if `forward` takes fewer inputs, or if it is one
    whole number a sample while the first is floating point.
    """

    def __init__(self, model: nn.Module) -> None:
        parameters = inspect.signature(model.forward).parameters.values()
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self.names = {p.name for p in parameters}
        self.takes = sum(p.kind in positional for p in parameters)
        self.takes_any = any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters)

    def __call__(self, raw: Any) -> Split:
        if isinstance(raw, Tensor):
            return (raw,), {}, None
        if isinstance(raw, Mapping):
            kwargs = {k: v for k, v in raw.items() if k not in LABEL_KEYS}
            labels = next((raw[k] for k in LABEL_KEYS if isinstance(raw.get(k), Tensor)), None)
            return (), kwargs, labels
        if isinstance(raw, (tuple, list)):
            args = tuple(raw)
            if len(args) > 1 and (_is_label(args) or (len(args) > self.takes and not self.takes_any)):
                last = args[-1]
                return args[:-1], {}, last if _is_label(args) else None
            return args, {}, None
        return (raw,), {}, None


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
