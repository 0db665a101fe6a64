"""Which kernel each packed layer runs on, chosen by measurement on this machine.

`choose_kernels` runs each layer on the input that it gets in one forward, on each kernel of
`hq_plugin.nn.kernels` that takes it. A kernel's result is compared with the layer's own before its time counts,
and times are kept in a file.
"""

from __future__ import annotations

import copy
import json
import math
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hq_plugin import adapters
from hq_plugin.errors import HQWarning, KernelError
from hq_plugin.folding import batchnorm_after, fold, unfold
from hq_plugin.nn import PackedModule, is_plain, packed_modules
from hq_plugin.nn.kernels import KERNELS, REFERENCE, Bound, ByRows, Run, norm_of
from hq_plugin.probe import first_inputs
from hq_plugin.storage import write_text
from hq_plugin.timing import OtherMemory, device_name, machine, median_milliseconds

#: Counts changes of how fast kernels are: what was measured before one is measured again.
_VERSION = 4
#: A kernel must be faster by this factor to be worth its memory: than the reference, and as a second one.
_WORTH = 1.05


@dataclass(frozen=True)
class Choice:
    """What was found for one layer.

    Attributes:
        kernel: The kernel chosen.
        milliseconds: Median time of each kernel that passed its check, the reference included.
        refused: Why each other kernel was not measured.
        one_row: The same for a single row of the input, where that was measured, too.
        folded: Whether the layer computes the BatchNorm after it as well; times are without.
    """

    kernel: str
    milliseconds: dict[str, float]
    refused: dict[str, str]
    one_row: Choice | None = None
    folded: bool = False


def use_kernel(model: nn.Module, name: str) -> list[str]:
    """Lets every layer that can run on one kernel.

    Args:
        model: A converted model, or a pipeline with one; changed in place.
        name: A name of `KERNELS`, or `"dequantized"`, which undoes every choice.

    Returns:
        The layers that run on it now.

    Raises:
        KernelError: There is no such kernel.
    """
    if name != REFERENCE and name not in KERNELS:
        raise KernelError(f"There is no kernel {name!r}. Kernels are: {', '.join([REFERENCE, *KERNELS])}.")
    model = adapters.opened(model)
    unfold(model)
    done = []
    for path, layer in packed_modules(model).items():
        if name == REFERENCE:
            layer.set_kernel(None)
            done.append(path)
        elif KERNELS[name].refuses(layer) is None:
            layer.set_kernel(Bound(KERNELS[name], layer))
            done.append(path)
    return done


def kernel_of(layer: PackedModule, rows: int | None = None) -> str:
    """Returns the name of the kernel that a layer runs on.

    Args:
        layer: The layer.
        rows: Rows of its input, where the kernel depends on them; None is many.
    """
    bound = layer._kernel
    if isinstance(bound, ByRows):
        bound = bound.many if rows is None else bound.of(rows)
    return bound.kernel.name if isinstance(bound, Bound) else REFERENCE


@torch.no_grad()
def choose_kernels(model: nn.Module, *args: Any, cache: Path | None = None, **kwargs: Any) -> dict[str, Choice]:
    """Measures the kernels of every packed layer on this machine, and lets each layer run on its fastest.

    Each layer is measured on the input that it gets in one forward; a linear layer also on one row (sample, token)
    of it, and keeps a kernel for each of the two where they differ. Inputs whose rows are nearer to one than to
    those measured, by ratio, run on the first. Between two runs of a layer as many bytes are read as the model's
    layers have (alone it would find its weight in the processor's cache), and a copy of it runs (the kernel's code
    is in the cache, as in a model). Layers of equal shapes and widths are measured once; results are kept in a
    file, under the machine and the versions they are for.

    A convolution whose result goes into a BatchNorm and nowhere else computes that as well, in eval mode; a hook
    that is put on the convolution later sees it normalised. Undo it (`use_kernel(model, "dequantized")`) before
    one of the two is put in another module's place.

    Args:
        model: A converted model in eval mode; changed in place.
        *args: Inputs of the size that it will be used with: for a language model, a prompt. Or a dict of them.
        cache: File that keeps measurements; None takes `kernels.json` in `~/.cache/hq_plugin`, or in the
            folder that the environment variable `HQ_PLUGIN_CACHE` names.
        **kwargs: More inputs.

    Returns:
        What was found, for each packed layer that ran.

    Raises:
        KernelError: The model holds no packed layer.
    """
    model = adapters.opened(model)
    named = args[0] if len(args) == 1 and isinstance(args[0], Mapping) else None  # as hq_plugin.export takes them
    return choose_by(model, lambda: model(*args, **kwargs) if named is None else model(**named), cache)


def choose_by(model: nn.Module, run: Callable[[], Any], cache: Path | None = None) -> dict[str, Choice]:
    """Does what `choose_kernels` does, for inputs of any name.

    Args:
        model: As for `choose_kernels`, and no pipeline.
        run: Runs it once.
        cache: As for `choose_kernels`.
    """
    layers = packed_modules(model)
    if not layers:
        raise KernelError("The model holds no packed layer. Call hq_plugin.quantize on it first.")
    use_kernel(model, REFERENCE)
    seen = first_inputs(layers, run)
    norms = batchnorm_after(model, layers, run)
    inputs = {name: x for name, x in seen.items() if x.is_floating_point()}
    path = cache or _cache_file()
    known = _read_cache(path)
    device = next(iter(layers.values())).weight_packed.device
    others = OtherMemory(sum(layer.weight_packed.numel() for layer in layers.values()), device)

    def found(layer: PackedModule, x: Tensor) -> Choice:
        key = f"{_key(layer, x)} {others.size} bytes and a twin between, kernels {_VERSION}"
        if key not in known:
            known[key] = measure(layer, x, others)
        return known[key]

    choices: dict[str, Choice] = {}
    for name, x in inputs.items():
        layer, choice = layers[name], found(layers[name], x)
        rows = x.numel() // max(x.shape[-1], 1)
        if is_plain(layer, nn.Linear) and rows > 1:
            choice = _by_rows(choice, found(layer, x.reshape(-1, x.shape[-1])[:1]))
        many, few = (_bound(layer, part.kernel) for part in (choice, choice.one_row or choice))
        same = choice.one_row is None or choice.one_row.kernel == choice.kernel
        layer.set_kernel(many if same else ByRows(few, many, math.isqrt(rows)))
        folded = name in norms and fold(layer, norms[name], choice.kernel, x)
        choices[name] = replace(choice, folded=folded)
    _write_cache(path, known)
    return choices


def _by_rows(many: Choice, one: Choice) -> Choice:
    """Joins what was found for many rows and for one; one kernel serves both where it is nearly as fast."""
    if many.milliseconds.get(one.kernel, math.inf) <= _WORTH * many.milliseconds[many.kernel]:
        many = replace(many, kernel=one.kernel)
    elif one.milliseconds.get(many.kernel, math.inf) <= _WORTH * one.milliseconds[one.kernel]:
        one = replace(one, kernel=many.kernel)
    return replace(many, one_row=one)


def _bound(layer: PackedModule, name: str) -> Bound | None:
    return None if name == REFERENCE else Bound(KERNELS[name], layer)


@torch.no_grad()
def measure(layer: PackedModule, x: Tensor, others: OtherMemory | None = None) -> Choice:
    """Checks and times every kernel of one layer on one input; the layer stays as it was.

    A kernel whose result is wrong on this machine is passed over with a warning.

    Args:
        layer: The layer.
        x: Its input.
        others: What is read between two runs of the layer, before a layer like it runs; None reads nothing.
    """
    before = layer._kernel
    layer.set_kernel(None)
    expected = layer(x)
    # A model runs a kernel again and again, on other weights: a twin's run warms its code, but not the weight.
    twin = None if others is None else copy.deepcopy(layer)

    def timed(run: Run, warm: Run | None) -> float:
        def between() -> None:
            if others is not None and warm is not None:
                others.read()
                warm(x)

        return median_milliseconds(lambda: run(x), between)

    milliseconds = {REFERENCE: timed(layer, twin)}
    refused: dict[str, str] = {}
    for name, kernel in KERNELS.items():
        reason = kernel.refuses(layer)
        if reason is None:
            try:
                run = Bound(kernel, layer).run
                error = relative_error(run(x), expected, layer, x)
                if not error <= kernel.tolerance:
                    reason = f"it is wrong on this machine (error {error:.2g}, allowed {kernel.tolerance:g})"
            except (RuntimeError, NotImplementedError) as failure:
                reason = f"it fails on this machine ({str(failure).splitlines()[0]})"
            if reason is not None:
                warnings.warn(
                    f"Kernel {name} is not used for {type(layer).__name__}: {reason}.", HQWarning, stacklevel=2
                )
        if reason is None:
            milliseconds[name] = timed(run, None if twin is None else Bound(kernel, twin).run)
        else:
            refused[name] = reason
    layer.set_kernel(before)
    fastest = min(milliseconds, key=lambda name: milliseconds[name] * (1 if name == REFERENCE else _WORTH))
    return Choice(fastest, milliseconds, refused)


def relative_error(found: Tensor, expected: Tensor, layer: PackedModule, x: Tensor) -> float:
    """Returns the norm of an error relative to that of the result, as it would be if no products cancelled."""
    size = norm_of(expected)
    if is_plain(layer, nn.Linear):
        # A single sum may be close to zero by chance; what rounding does to its products is not.
        size = max(size, norm_of(x) * norm_of(layer.weight) / math.sqrt(layer.weight_shape[1]))
    return norm_of(found.float() - expected.float()) / max(size, 1e-12)


def _key(layer: PackedModule, x: Tensor) -> str:
    shape = f"{tuple(x.shape)} {tuple(x.stride())}"
    unpacks = "" if layer._cache_enabled else " unpacks each time"  # so that other kernels win
    return f"{layer} {tuple(layer.weight_shape)} {x.dtype} {shape} {device_name(x.device)}{unpacks}"


def _cache_file() -> Path:
    folder = os.environ.get("HQ_PLUGIN_CACHE")
    return (Path(folder) if folder else Path.home() / ".cache" / "hq_plugin") / "kernels.json"


def _read_cache(path: Path) -> dict[str, Choice]:
    """Returns what was measured on this machine before; a file that cannot be read is none."""
    try:
        found = json.loads(path.read_text())[machine()]
        return {
            str(key): Choice(str(entry["kernel"]), dict(entry["milliseconds"]), dict(entry["refused"]))
            for key, entry in found.items()
            if entry["kernel"] in (REFERENCE, *KERNELS)
            and {REFERENCE, entry["kernel"]} <= set(entry["milliseconds"])
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _write_cache(path: Path, known: Mapping[str, Choice]) -> None:
    try:
        everything = json.loads(path.read_text())
    except (OSError, ValueError):
        everything = {}
    if not isinstance(everything, dict):
        everything = {}
    fields = ("kernel", "milliseconds", "refused")
    everything[machine()] = {
        key: {field: getattr(choice, field) for field in fields} for key, choice in known.items()
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(everything, indent=1))
    except OSError:
        return  # it is measured again next time
