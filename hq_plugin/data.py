"""Batches of any kind (`batch.py`), checked, split into training and held-out data.

Data that does not exist is made in `synthetic.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler, Subset
from torch.utils.data.distributed import DistributedSampler

from hq_plugin.batch import Batch, Split, _tensors, batch_splitter, make_batch
from hq_plugin.config import Config
from hq_plugin.errors import DataError, HQWarning

#: Leaders of the search are re-ranked on this many times the samples that score a candidate.
RERANK_FACTOR = 4
#: Samples below which what is held out says little.
FEW = 16


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

    def forever(self, least: int = 2) -> Iterator[Batch]:
        """Yields training batches without end, epoch after epoch, in an order that only the seed decides.

        Args:
            least: Samples of a batch, two for each process that takes a share of it: BatchNorm cannot normalise one
                by itself. What is left over with fewer is passed over, unless no batch has as many.
        """
        largest = 0
        for epoch in count():
            empty = True
            for batch in self.train.epoch(epoch) if isinstance(self.train, _Batches) else self.train:
                empty, largest = False, max(largest, batch.size)
                if batch.size >= least or largest < least:
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
    if isinstance(data, DataLoader) and _iterates_itself(data):
        return _from_batches(data, split, wanted)
    if isinstance(data, DataLoader) and not isinstance(data.dataset, IterableDataset):
        if data.batch_size is None and _length(data.batch_sampler) is not None:
            return _from_batch_sampler(data, split, wanted)
        if data.batch_size is None or (_chooses(data) and _length(data.sampler) is None):
            return _from_batches(data, split, wanted)
        return _from_dataset(data.dataset, data.batch_size, split, wanted, config.seed, data)
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        return _from_dataset(data, config.filled().batch_size or 1, split, wanted, config.seed, None)
    if isinstance(data, IterableDataset) and _gives_samples(data):
        data = DataLoader(data, batch_size=config.filled().batch_size or 1)
    if isinstance(data, str):
        raise DataError(
            f"data is the string {data[:80]!r}, not batches. Pictures are read by torchvision's ImageFolder, "
            "a text by open(...).read(), of which a language model takes a list; the command line takes paths."
        )
    if isinstance(data, np.ndarray):
        raise DataError("data is a numpy array, not batches: pass torch.from_numpy(data).split(64).")
    if callable(getattr(data, "train_dataloader", None)):
        raise DataError(
            f"data is a {type(data).__name__}, not batches. Call its setup and pass data.train_dataloader()."
        )
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
    total = _length(dataset)
    if total is None:
        raise DataError(f"{type(dataset).__name__} has no length. Give it __len__, or make it an IterableDataset.")
    # What a sampler draws, as often as it draws it; no sample that it leaves out is ever read.
    drawn = list(range(total)) if like is None or not _chooses(like) else [int(i) for i in like.sampler]
    samples = list(dict.fromkeys(drawn))
    if not samples:
        raise DataError("data is empty: the Dataset has no samples, or its sampler draws none.")
    shuffled = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist()
    order = [samples[i] for i in shuffled]
    held = min(wanted, len(samples) // 4)
    options: dict[str, Any] = {"batch_size": batch_size} | ({} if like is None else _reading(like))
    train_order = order[held:]
    if len(drawn) > len(samples):
        kept_back = set(order[:held])
        train_order = [i for i in drawn if i not in kept_back]
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


def _from_batch_sampler(loader: DataLoader, split: Callable[[Any], Split], wanted: int) -> Data:
    """Holds out the first batches that a batch sampler draws, and leaves their samples out of those that train."""
    drawn = [list(batch) for batch in cast(Iterable[list[Any]], loader.batch_sampler)]
    if not drawn:
        raise DataError("data is empty: its batch sampler draws no batch.")
    sizes = np.cumsum([len(batch) for batch in drawn])
    first = min(int(np.searchsorted(sizes, wanted)) + 1, max(len(drawn) // 4, 1)) if len(drawn) > 1 else 0
    held = {sample for batch in drawn[:first] for sample in batch}
    train = DataLoader(loader.dataset, batch_sampler=_Without(loader.batch_sampler, held), **_reading(loader))  # type: ignore[arg-type]
    measures = DataLoader(loader.dataset, batch_sampler=drawn[:first] or drawn, **_reading(loader))  # type: ignore[arg-type]
    return Data(_Batches(train, split), [make_batch(raw, split) for raw in measures], shared=not first)


class _Without:
    """A batch sampler's batches, as it draws them anew for each epoch, without some samples."""

    def __init__(self, drawn: Iterable[list[Any]], held: set[Any]) -> None:
        self.drawn, self.held = drawn, held

    def __iter__(self) -> Iterator[list[Any]]:
        for batch in self.drawn:
            kept = [sample for sample in batch if sample not in self.held]
            if kept:
                yield kept


def _reading(loader: DataLoader) -> dict[str, Any]:
    """Returns how a loader reads its samples, for another one that reads some of them."""
    names = ("collate_fn", "num_workers", "worker_init_fn", "multiprocessing_context", "timeout")
    return {name: getattr(loader, name) for name in names}


def _iterates_itself(loader: DataLoader) -> bool:
    """Whether a subclass gives other batches than its dataset does: what it does to them must not be lost.

    accelerate's only place them; the same do timm's, which keep their workers.
    """
    known = ("accelerate.", "timm.", "torch.")
    return type(loader).__iter__ is not DataLoader.__iter__ and not type(loader).__module__.startswith(known)


def _chooses(loader: DataLoader) -> bool:
    """Whether a loader's sampler is more than an order of all samples; each process has all, whatever it says."""
    return not isinstance(loader.sampler, (SequentialSampler, RandomSampler, DistributedSampler))


def _gives_samples(data: Iterable[Any]) -> bool:
    """Whether a stream gives samples and not batches: a label of its own stands beside each input."""
    first = next(iter(data), None)
    if not isinstance(first, (tuple, list)) or len(first) != 2 or not isinstance(first[0], (Tensor, np.ndarray)):
        return False
    return first[0].ndim > 0 and (isinstance(first[1], (int, np.integer)) or getattr(first[1], "ndim", None) == 0)


def _length(data: Any) -> int | None:
    """Returns the length of what has one; a DataLoader of a stream has the method, and fails in it."""
    try:
        return len(data)
    except (TypeError, NotImplementedError):
        return None


def _from_batches(data: Iterable[Any], split: Callable[[Any], Split], wanted: int) -> Data:
    length = _length(data)
    limit = None if length is None else max(length // 4, 1)
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
    if not more and length is None and len(holdout) > 1:
        # It ended before enough was held out, which nobody could know: a part of it is, then.
        holdout, more = holdout[: max(len(holdout) // 4, 1)], True
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
