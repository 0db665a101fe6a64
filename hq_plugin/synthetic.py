"""Made-up batches for a model that comes without data.

Inputs start as noise. Where the model has BatchNorm layers, the noise is trained until the statistics
that it causes there match the stored ones (ZeroQ, Cai et al., arXiv:2001.00281, section 3.1). Real data
does better: this calibrates ranges and lets distillation run, no more.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hq_plugin import adapters
from hq_plugin.batch import Batch
from hq_plugin.batchnorm import foldable
from hq_plugin.data import Data
from hq_plugin.errors import DataError, HQWarning
from hq_plugin.progress import progress

_IMAGE_SIZES = (32, 224, 64, 28)
_SEQUENCE = 64


def synthetic_data(
    model: nn.Module,
    *,
    batch_size: int,
    batches: int,
    held: int,
    seed: int,
    steps: int,
    show: bool | None = False,
) -> Data:
    """Makes training and held-out batches for a model.

    Args:
        model: The float model.
        batch_size: Samples a batch.
        batches: Training batches.
        held: Held-out batches.
        seed: Seeds the noise.
        steps: Optimizer steps that fit each batch to the BatchNorm statistics.
        show: Whether to show a progress bar; None on a terminal only.

    Raises:
        DataError: The shape of the model's inputs cannot be found out.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    args, kwargs = _example(model)
    warnings.warn(
        "No data was given: the model is quantized on synthetic batches. Real data, a few hundred "
        "unlabelled samples even, gives a much better result: pass data=...",
        HQWarning,
        stacklevel=4,
    )
    made = []
    with progress(show) as bars:
        bar = bars.task("synthetic data", total=batches + held)
        for _ in range(batches + held):
            made.append(_batch(model, args, kwargs, batch_size, generator, steps))
            bar.advance()
    return Data(made[held:], made[:held], synthetic=True)


def _batch(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    batch_size: int,
    generator: torch.Generator,
    steps: int,
) -> Batch:
    """Makes one batch in the image of an example."""
    inputs = [_noise_like(value, batch_size, generator, model) for value in (*args, *kwargs.values())]
    _match_batchnorm(model, inputs, list(kwargs), len(args), steps)
    keyed = dict(zip(kwargs, inputs[len(args) :], strict=True))
    return Batch(tuple(inputs[: len(args)]), keyed, None, batch_size)


def _example(model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns one example input, from the model's adapter or by trying what its first layer takes."""
    adapter = adapters.find(model)
    if adapter is not None:
        return adapter.example_inputs(model)
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    for guess in _guesses(model):
        example = guess.to(like) if guess.is_floating_point() else guess.to(like.device)
        try:
            with torch.no_grad():
                model(example)
        except (RuntimeError, ValueError, IndexError, TypeError, AssertionError):
            continue
        return (example,), {}
    raise DataError(
        "No data was given, and the shape of the model's inputs cannot be found out. Pass data=[batch, ...]."
    )


def _guesses(model: nn.Module) -> list[Tensor]:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return [torch.randn(3, module.in_channels, size, size) for size in _IMAGE_SIZES]
        if isinstance(module, nn.Conv1d):
            return [torch.randn(3, module.in_channels, length) for length in (128, 1024, 16_000)]
        if isinstance(module, nn.Embedding):
            return [torch.randint(module.num_embeddings, (3, length)) for length in (_SEQUENCE, 16, 1)]
        if isinstance(module, nn.Linear):
            width = module.in_features
            return [torch.randn(3, width), torch.randn(3, _SEQUENCE, width)]
    return []


def _noise_like(value: Any, batch_size: int, generator: torch.Generator, model: nn.Module) -> Any:
    if not isinstance(value, Tensor):
        return value
    shape = (batch_size, *value.shape[1:])
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if value.is_floating_point():
        return torch.randn(shape, generator=generator, dtype=value.dtype).to(device)
    top = next((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), 2)
    return torch.randint(0, top, shape, generator=generator, dtype=value.dtype).to(device)


def _match_batchnorm(model: nn.Module, inputs: list[Any], names: list[str], count: int, steps: int) -> None:
    """Trains floating inputs in place until BatchNorm inputs have the stored mean and deviation."""
    layers = [module for module in model.modules() if foldable(module)]
    free = [value for value in inputs if isinstance(value, Tensor) and value.is_floating_point()]
    if not layers or not free:
        return
    terms: list[Tensor] = []

    def compare(module: Any, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        axes = [axis for axis in range(x.dim()) if axis != 1]
        deviation = module.running_var.sqrt().clamp_min(1e-3)  # type: ignore[operator, union-attr]
        mean_error = (x.mean(axes) - module.running_mean) / deviation
        ratio = x.std(axes, correction=0) / deviation
        terms.append(mean_error.square().mean() + (ratio - 1).square().mean())

    handles = [layer.register_forward_pre_hook(compare) for layer in layers]
    for value in free:
        value.requires_grad_(True)
    optimizer = torch.optim.Adam(free, lr=0.1)
    run: Callable[..., Any] = model
    for _ in range(steps):
        terms.clear()
        run(*inputs[:count], **dict(zip(names, inputs[count:], strict=True)))
        optimizer.zero_grad()
        torch.stack(terms).mean().backward()
        optimizer.step()
    for handle in handles:
        handle.remove()
    for value in free:
        value.requires_grad_(False)
