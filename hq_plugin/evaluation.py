"""Accuracy on labelled data, perplexity of text: for `hq-plugin evaluate` and for an `eval_fn`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from hq_plugin.batch import batch_splitter, make_batch
from hq_plugin.config import Config
from hq_plugin.distillation import class_scores, hits
from hq_plugin.errors import DataError


@torch.no_grad()
def accuracy(model: nn.Module, data: Iterable[Any] | Dataset[Any], config: Config) -> tuple[float, int]:
    """Measures top-1 accuracy.

    Args:
        model: Gives class scores.
        data: Labelled batches, a DataLoader or a Dataset; all of it is used.
        config: Gives `batch_size` for a Dataset, and `prepare_batch`.

    Returns:
        Share of samples that are right, and their number.

    Raises:
        DataError: The data is empty, or has no labels or such that do not fit the outputs.
    """
    if isinstance(data, Dataset):
        data = DataLoader(data, batch_size=config.filled().batch_size)
    split = batch_splitter(model, config)
    device = next((tensor.device for tensor in model.state_dict().values()), torch.device("cpu"))
    model.eval()
    right = total = 0
    for raw in data:
        batch = make_batch(raw, split).to(device)
        scores = class_scores(batch.run(model))
        if scores is None or batch.labels is None:
            raise DataError(
                "Accuracy needs a model with class scores and data with labels: (inputs, labels), or a "
                "folder of images with a folder for each class."
            )
        found = hits(scores, batch.labels)
        if found is None:
            raise DataError(
                f"Labels of shape {tuple(batch.labels.shape)} do not fit class scores of shape "
                f"{tuple(scores.shape)}: give one whole number for each of {tuple(scores.shape[:-1])}."
            )
        right += int(found.sum())
        total += found.numel()
    if total == 0:
        raise DataError("data is empty: it gave no batch.")
    return right / total, total


@torch.no_grad()
def perplexity(model: nn.Module, data: Iterable[Any] | Dataset[Any], config: Config) -> tuple[float, int]:
    """Measures the perplexity of a causal language model: e to the mean negative log-likelihood of the next token.

    Args:
        model: Gives scores `[samples, tokens, vocabulary]`.
        data: Batches with `input_ids`, a DataLoader or a Dataset; all of it is used.
        config: Gives `batch_size` for a Dataset, and `prepare_batch`.

    Returns:
        The perplexity, and the number of tokens that were predicted.

    Raises:
        DataError: The data holds no token ids, or the model gives no scores of tokens.
    """
    if isinstance(data, Dataset):
        data = DataLoader(data, batch_size=config.filled().batch_size)
    split = batch_splitter(model, config)
    device = next((tensor.device for tensor in model.state_dict().values()), torch.device("cpu"))
    model.eval()
    surprise, tokens = 0.0, 0
    for raw in data:
        batch = make_batch(raw, split).to(device)
        ids, scores = batch.kwargs.get("input_ids"), class_scores(batch.run_whole(model))
        if ids is None or scores is None or scores.shape[:2] != ids.shape:
            raise DataError("Perplexity needs a causal language model, and text or batches with input_ids.")
        kept = torch.ones_like(ids, dtype=torch.bool) if batch.kept is None else batch.kept
        follows = kept[:, 1:] & kept[:, :-1]
        losses = F.cross_entropy(scores[:, :-1][follows].float(), ids[:, 1:][follows], reduction="sum")
        surprise += float(losses)
        tokens += int(follows.sum())
    if tokens == 0:
        raise DataError("data is empty: it gave no token to predict.")
    return math.exp(surprise / tokens), tokens
