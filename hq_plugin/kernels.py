"""Which kernel a packed layer runs on, chosen by measurement on this machine.

A packed layer's own forward dequantizes its weight and computes in floating point: exact, and as fast as the
float model. A kernel here computes the same from the integers, with what torch ships. None is taken on trust:
`choose_kernels` compares each one's result with the layer's own before it measures it.

=============== ======================================== ===================== ==========================
kernel          layers                                   computes in           result
=============== ======================================== ===================== ==========================
`dequantized`   all                                      dtype of the input    the reference
`bfloat16`      Linear, float input                      bfloat16              rounded to bfloat16
`int4`          Linear, float input, weights up to 4 bit bfloat16              rounded to bfloat16
`int8_weight`   Linear, float input, whole channels      bfloat16              rounded to bfloat16
`int8`          Linear and Conv2d, quantized input,      8-bit integers        equal up to float rounding
                whole channels
=============== ======================================== ===================== ==========================
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hq_plugin.errors import HQWarning, KernelError
from hq_plugin.nn import PackedModule, affine_weight, is_plain, packed_modules
from hq_plugin.policy import FLOAT_BITS
from hq_plugin.storage import write_text

#: The kernel that every layer has: its own forward.
REFERENCE = "dequantized"
#: Calls of which the median is taken, after as many to warm up as the second number says.
_REPEATS, _WARM_UP = 15, 3
#: A kernel must be faster than the reference by this factor to be worth its memory.
_WORTH = 1.05

Run = Callable[[Tensor], Tensor]


class Kernel(ABC):
    """A way to compute a packed layer.

    Attributes:
        name: Its name in the registry.
        tolerance: Largest error that passes its check, relative to the norm of the reference's result.
    """

    name: str
    tolerance: float

    @abstractmethod
    def refuses(self, layer: PackedModule) -> str | None:
        """Returns why the kernel cannot compute a layer, or None if it can."""

    @abstractmethod
    def bind(self, layer: PackedModule) -> Run:
        """Prepares a layer's weight; returns what computes the layer from its input."""


class Bound:
    """A kernel bound to a layer: what the layer's forward calls."""

    def __init__(self, kernel: Kernel, layer: PackedModule) -> None:
        self.kernel = kernel
        self.run = kernel.bind(layer)

    def __call__(self, x: Tensor) -> Tensor:
        """Computes the layer from its float input."""
        return self.run(x)

    def again(self, layer: PackedModule) -> Bound | None:
        """Returns the kernel bound to the layer as it is now (moved, or in another dtype), if it still can be."""
        return None if self.kernel.refuses(layer) else Bound(self.kernel, layer)


def _not_a_float_linear(layer: PackedModule) -> str | None:
    if not is_plain(layer, nn.Linear):
        return "it is not a plain Linear layer"
    if layer.bits.activation != FLOAT_BITS:
        return "its input is quantized"
    if layer.weight_packed.device.type != "cpu":
        return "it is for CPUs"
    return None


class _BFloat16(Kernel):
    name, tolerance = "bfloat16", 1e-2

    def refuses(self, layer: PackedModule) -> str | None:
        return _not_a_float_linear(layer)

    def bind(self, layer: PackedModule) -> Run:
        weight, bias = layer.weight.detach().bfloat16(), _bias(layer)

        def run(x: Tensor) -> Tensor:
            return _biased(F.linear(x.bfloat16(), weight).to(x.dtype), bias)

        return run


class _Int4(Kernel):
    """torch's 4-bit weights in groups with float zero points; narrower widths are widened to 4 bits."""

    name, tolerance = "int4", 2e-2

    def refuses(self, layer: PackedModule) -> str | None:
        if (reason := _not_a_float_linear(layer)) is not None:
            return reason
        if layer.bits.weight > 4:
            return "its weights have more than 4 bits"
        rows, inputs = layer.weight_shape
        if rows % 16 or _int4_group(layer) is None:
            return f"its weight of {rows} x {inputs} does not fit groups of 32, 64, 128 or 256 and rows of 16"
        return None

    def bind(self, layer: PackedModule) -> Run:
        rows, inputs = layer.weight_shape
        group = _int4_group(layer)
        assert group is not None
        # The kernel's weight is (integer - 8) * scale + zero; ours (integer [+ 1/2] - zero) * step.
        integers, step, offset = affine_weight(layer)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers.int() + 8, 1)
        pairs = torch.stack([step, offset * step], dim=-1)  # [rows, groups, 2]
        pairs = pairs.repeat_interleave(inputs // group // pairs.shape[1], dim=1)
        pairs, bias = pairs.transpose(0, 1).contiguous().bfloat16(), _bias(layer)

        def run(x: Tensor) -> Tensor:
            flat = x.reshape(-1, inputs).bfloat16()
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, packed, group, pairs)
            return _biased(y.to(x.dtype).view(*x.shape[:-1], rows), bias)

        return run


def _int4_group(layer: PackedModule) -> int | None:
    """Returns the largest group of the kernel that lies inside the layer's own."""
    own = layer.bits.group_size or layer.weight_shape[1]
    return next((size for size in (256, 128, 64, 32) if own % size == 0), None)


class _Int8Weight(Kernel):
    """torch's 8-bit weights a channel; any width fits."""

    name, tolerance = "int8_weight", 2e-2

    def refuses(self, layer: PackedModule) -> str | None:
        if (reason := _not_a_float_linear(layer)) is not None:
            return reason
        if layer.bits.group_size:
            return "its weight has groups"
        # torch reads past the end of other rows, and may crash.
        return f"its {layer.weight_shape[1]} inputs are no multiple of 16" if layer.weight_shape[1] % 16 else None

    def bind(self, layer: PackedModule) -> Run:
        integers, scale = _whole(layer)
        scale, bias = scale.bfloat16(), _bias(layer)
        rows, inputs = layer.weight_shape

        def run(x: Tensor) -> Tensor:
            y = torch.ops.aten._weight_int8pack_mm(x.reshape(-1, inputs).bfloat16(), integers, scale)
            return _biased(y.to(x.dtype).view(*x.shape[:-1], rows), bias)

        return run


class _Int8(Kernel):
    """oneDNN's product of 8-bit inputs and 8-bit weights, accumulated in 32-bit integers."""

    name, tolerance = "int8", 1e-4

    def refuses(self, layer: PackedModule) -> str | None:
        if not (is_plain(layer, nn.Linear) or is_plain(layer, nn.Conv2d)):
            return "it is not a plain Linear or Conv2d layer"
        if layer.bits.activation == FLOAT_BITS:
            return "its input is not quantized"
        if layer.bits.group_size:
            return "its weight has groups"
        if isinstance(layer, nn.Conv2d) and (layer.padding_mode != "zeros" or isinstance(layer.padding, str)):
            return "its padding is not a number of zeros"
        if layer.weight_packed.device.type != "cpu" or not hasattr(torch.ops.onednn, "qlinear_pointwise"):
            return "it is for CPUs with oneDNN"
        return None

    def bind(self, layer: PackedModule) -> Run:
        integers, scale = _whole(layer)
        step, zero_point = float(layer.activation_step), int(layer.activation_zero_point)
        top = 2**layer.bits.activation - 1
        zeros = torch.zeros(layer.weight_shape[0], dtype=torch.int32)
        bias = _bias(layer)
        bias = None if bias is None else bias.float()

        def quantized(x: Tensor) -> Tensor:
            return (x / step).round_().add_(zero_point).clamp_(0, top).to(torch.uint8)

        tail: tuple[Any, ...] = (1.0, 0, torch.float32, "none", [], "")
        if isinstance(layer, nn.Conv2d):
            settings = [list(layer.stride), list(layer.padding), list(layer.dilation), layer.groups]  # type: ignore[arg-type]
            packed = torch.ops.onednn.qconv_prepack(integers, scale, step, zero_point, *settings)

            def convolve(x: Tensor) -> Tensor:
                y = torch.ops.onednn.qconv2d_pointwise(
                    quantized(x), step, zero_point, packed, scale, zeros, bias, *settings, *tail
                )
                return y.to(x.dtype)

            return convolve
        packed = torch.ops.onednn.qlinear_prepack(integers, None)

        def multiply(x: Tensor) -> Tensor:
            y = torch.ops.onednn.qlinear_pointwise(
                quantized(x), step, zero_point, packed, scale, zeros, bias, *tail
            )
            return y.to(x.dtype)

        return multiply


def _whole(layer: PackedModule) -> tuple[Tensor, Tensor]:
    """Returns a weight of whole channels as int8 integers in its shape and float32 steps."""
    integers, step, _ = affine_weight(layer)
    return integers.view(layer.weight_shape), step.view(-1)


def _bias(layer: PackedModule) -> Tensor | None:
    bias = layer._parameters.get("bias")
    return None if bias is None else bias.detach()


def _biased(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias


KERNELS: dict[str, Kernel] = {kernel.name: kernel for kernel in (_BFloat16(), _Int4(), _Int8Weight(), _Int8())}


@dataclass(frozen=True)
class Choice:
    """What was found for one layer.

    Attributes:
        kernel: The kernel chosen.
        milliseconds: Median time of each kernel that passed its check, the reference included.
        refused: Why each other kernel was not measured.
    """

    kernel: str
    milliseconds: dict[str, float]
    refused: dict[str, str]


def use_kernel(model: nn.Module, name: str) -> list[str]:
    """Lets every layer that can run on one kernel.

    Args:
        model: A converted model; changed in place.
        name: A name of `KERNELS`, or `"dequantized"`, which undoes every choice.

    Returns:
        The layers that run on it now.

    Raises:
        KernelError: There is no such kernel.
    """
    if name != REFERENCE and name not in KERNELS:
        raise KernelError(f"There is no kernel {name!r}. Kernels are: {', '.join([REFERENCE, *KERNELS])}.")
    done = []
    for path, layer in packed_modules(model).items():
        if name == REFERENCE:
            layer.set_kernel(None)
            done.append(path)
        elif KERNELS[name].refuses(layer) is None:
            layer.set_kernel(Bound(KERNELS[name], layer))
            done.append(path)
    return done


def kernel_of(layer: PackedModule) -> str:
    """Returns the name of the kernel that a layer runs on."""
    bound = layer._kernel
    return bound.kernel.name if isinstance(bound, Bound) else REFERENCE


@torch.no_grad()
def choose_kernels(model: nn.Module, *args: Any, cache: Path | None = None, **kwargs: Any) -> dict[str, Choice]:
    """Measures the kernels of every packed layer on this machine, and lets each layer run on its fastest.

    Each layer is measured on the input that it gets in one forward. Layers of equal shapes and widths are
    measured once; results are kept in a file, under the machine and the versions they are for.

    Args:
        model: A converted model in eval mode; changed in place.
        *args: Inputs of the size that it will be used with.
        cache: File that keeps measurements; None takes `kernels.json` in `~/.cache/hq_plugin`, or in the
            folder that the environment variable `HQ_PLUGIN_CACHE` names.
        **kwargs: More inputs.

    Returns:
        What was found, for each packed layer that ran.

    Raises:
        KernelError: The model holds no packed layer.
    """
    layers = packed_modules(model)
    if not layers:
        raise KernelError("The model holds no packed layer. Call hq_plugin.quantize on it first.")
    use_kernel(model, REFERENCE)
    inputs = _inputs(model, layers, args, kwargs)
    path = cache or _cache_file()
    known = _read_cache(path)
    choices: dict[str, Choice] = {}
    for name, x in inputs.items():
        layer = layers[name]
        key = _key(layer, x)
        if key not in known:
            known[key] = measure(layer, x)
        choices[name] = known[key]
        if choices[name].kernel != REFERENCE:
            layer.set_kernel(Bound(KERNELS[choices[name].kernel], layer))
    _write_cache(path, known)
    return choices


@torch.no_grad()
def measure(layer: PackedModule, x: Tensor) -> Choice:
    """Checks and times every kernel of one layer on one input; the layer stays as it was.

    A kernel whose result is wrong on this machine is passed over with a warning.
    """
    before = layer._kernel
    layer.set_kernel(None)
    expected = layer(x)
    milliseconds = {REFERENCE: median_milliseconds(lambda: layer(x))}
    refused: dict[str, str] = {}
    for name, kernel in KERNELS.items():
        reason = kernel.refuses(layer)
        if reason is None:
            try:
                run = Bound(kernel, layer)
                error = float((run(x) - expected).norm() / expected.norm().clamp_min(1e-12))
                if not error <= kernel.tolerance:
                    reason = f"it is wrong on this machine (error {error:.2g}, allowed {kernel.tolerance:g})"
            except (RuntimeError, NotImplementedError) as failure:
                reason = f"it fails on this machine ({str(failure).splitlines()[0]})"
            if reason is not None:
                warnings.warn(
                    f"Kernel {name} is not used for {type(layer).__name__}: {reason}.", HQWarning, stacklevel=2
                )
        if reason is None:
            milliseconds[name] = median_milliseconds(lambda run=run: run(x))  # type: ignore[misc]
        else:
            refused[name] = reason
    layer.set_kernel(before)
    fastest = min(milliseconds, key=lambda name: milliseconds[name] * (1 if name == REFERENCE else _WORTH))
    return Choice(fastest, milliseconds, refused)


def median_milliseconds(call: Callable[[], Any]) -> float:
    """Returns the median wall time of a call, after some to warm up."""
    for _ in range(_WARM_UP):
        call()
    times = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e3


def machine() -> str:
    """Returns what a measurement is for: processor, threads and version of torch."""
    return f"{platform.machine()}, {_cpu()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.platform()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _inputs(
    model: nn.Module, layers: Mapping[str, PackedModule], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Tensor]:
    """Returns the first input of each layer in one forward."""
    inputs: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def see(module: nn.Module, given: tuple[Any, ...]) -> None:
            if given and isinstance(given[0], Tensor) and given[0].is_floating_point():
                inputs.setdefault(name, given[0].detach())

        return see

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return inputs


def _key(layer: PackedModule, x: Tensor) -> str:
    return f"{layer} {tuple(layer.weight_shape)} {x.dtype} {tuple(x.shape)} {tuple(x.stride())}"


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
    everything[machine()] = {key: vars(choice) for key, choice in known.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(everything, indent=1))
    except OSError:
        return  # it is measured again next time
