"""The door to torch.ao: fake-quantizers, observers, QConfigs, `prepare` and `convert`.

This is the only file that imports torch.ao. A policy becomes per-layer QConfigs; torch.ao's own
`prepare_qat` and `convert` swap the layers by mappings that are built for the types found in the model,
so that subclasses (timm's Conv2dSame, say) are swapped like their base. The prepared layer is a subclass
of the float layer that fake-quantizes its own input and weight; the converted one is a packed layer of
`hq_plugin.nn`. Both take and give float tensors: no stubs, no graph.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.ao.nn.intrinsic.qat as nniqat
import torch.ao.nn.qat as nnqat
import torch.ao.quantization as tq
from torch import Tensor, nn
from torch.ao.quantization.fake_quantize import FakeQuantizeBase
from torch.ao.quantization.observer import ObserverBase
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from hq_plugin.batchnorm import fold_batchnorm
from hq_plugin.errors import HQWarning, ModelError, PolicyError
from hq_plugin.metaquantnet import ActivationSteps, MetaQuantNet
from hq_plugin.nn import (
    HOOKS,
    PackedModule,
    adopt,
    replace_modules,
    share_packed_weight,
    take_over_hooks,
    with_layers_of,
)
from hq_plugin.nn.packed import versions
from hq_plugin.optimal_qparams import optimal_activation_qparams
from hq_plugin.policy import FLOAT_BITS, HybridPolicy, LayerBits
from hq_plugin.qat_layers import QATMixin, qat_layers, qat_type, set_trainable
from hq_plugin.quantization import fake_quantize_rows
from hq_plugin.sites import KINDS, OWN_FORWARD
from hq_plugin.weight_blocks import WeightBlock

__all__ = [
    "ActivationObserver",
    "HybridActivationFakeQuantize",
    "HybridFakeQuantize",
    "HybridWeightFakeQuantize",
    "apply_policy",
    "cached_weights",
    "calibrate",
    "calibration_kept",
    "convert",
    "float_forward",
    "get_qconfig_mapping",
    "prepare",
    "set_trainable",
]


class ActivationObserver(ObserverBase):
    """Keeps a sample of the values seen, from which step and zero point of any width are found.

    Args:
        bits: The width for which `calculate_qparams` answers.
        samples: Values kept of each batch, at most; batches are thinned evenly, so that no randomness is needed.
    """

    def __init__(self, bits: int = 8, samples: int = 8192, **_: Any) -> None:
        super().__init__(dtype=torch.quint8)
        self.bits, self.samples = bits, samples
        self.low, self.high = float("inf"), float("-inf")
        self.values: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        """Observes an activation of any shape and returns it."""
        flat = x.detach().float().flatten()
        if flat.numel():
            self.low, self.high = min(self.low, float(flat.min())), max(self.high, float(flat.max()))
            self.values.append(flat[:: _stride(flat.numel(), self.samples)].clone())
        return x

    def qparams(self, bits: int) -> tuple[float, float]:
        """Returns step and zero point of least squared error at a width."""
        if not self.values:
            return 1.0, 0.0
        return optimal_activation_qparams(torch.cat(self.values), self.low, self.high, bits)

    def calculate_qparams(self, **_: Any) -> tuple[Tensor, Tensor]:
        """Returns step and zero point at the observer's own width."""
        step, zero_point = self.qparams(self.bits)
        return torch.tensor([step]), torch.tensor([int(zero_point)], dtype=torch.int32)


def _stride(numel: int, samples: int) -> int:
    """Returns by which stride to thin a tensor: one that has no divisor in common with its size.

    Any other sees some places alone: the first column of 32 x 32 pixels, which is background in most pictures.
    """
    stride = max(1, -(-numel // samples))
    while math.gcd(stride, numel) > 1:
        stride += 1
    return stride


class HybridFakeQuantize(FakeQuantizeBase):
    """A torch.ao fake-quantizer whose width can be set at any time, driven by a MetaQuantNet.

    Attributes:
        bits: The width in force.
    """

    dtype: torch.dtype
    qscheme: torch.qscheme
    is_dynamic = False

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self._switch: tuple[list[tuple[int, int]], bool] | None = None

    @property
    def active(self) -> bool:
        """Whether it quantizes now (torch.ao's `disable_fake_quant` and `enable_fake_quant` decide)."""
        # The switch is a tensor: a GPU is asked for its value only when that may have changed.
        now = versions(self.fake_quant_enabled)
        if self._switch is None or self._switch[0] != now:
            self._switch = now, bool(self.fake_quant_enabled[0])
        return self._switch[1]

    def extra_repr(self) -> str:
        """Shows the width."""
        return f"bits={self.bits}"


class HybridWeightFakeQuantize(HybridFakeQuantize):
    """Gives the weight that a MetaQuantNet block generates for the width in force.

    Args:
        bits: The width in force.
        block: The block; None builds a one-width table from the first weight seen. A QAT loop that
            leaves it None runs one forward before it makes its optimizer.
        group_size: Group size of the table that is built.
    """

    dtype = torch.qint8
    qscheme = torch.per_channel_symmetric

    def __init__(self, bits: int = 8, block: WeightBlock | None = None, group_size: int = 0, **_: Any) -> None:
        super().__init__(bits)
        self.block = block
        self._group_size = group_size
        #: Whether the layer computes in autocast's precision where that is on; an embedding does not.
        self.casts = False
        self._cache: dict[tuple[int, torch.dtype], Tensor] | None = None

    def forward(self, weight: Tensor) -> Tensor:
        """Returns the fake-quantized weight, in the shape and dtype of `weight`."""
        if not self.active:
            return weight
        if self._cache is not None:
            kind, dtype = weight.device.type, weight.dtype
            if self.casts and torch.is_autocast_enabled(kind):
                # The layer would cast it in each forward, and half of the memory is enough.
                dtype = torch.get_autocast_dtype(kind)
            # By the dtype, too: what re-estimates BatchNorm and what the user measures run without autocast.
            if (self.bits, dtype) not in self._cache:
                self._cache[self.bits, dtype] = self._ready(weight)(weight, self.bits).detach().to(dtype)
            return self._cache[self.bits, dtype]
        generated: Tensor = self._ready(weight)(weight, self.bits)
        return generated

    def lookup(self, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor] | None:
        """Returns fake-quantized rows for a lookup, without quantizing the whole table.

        Args:
            weight: `[rows, width]`.
            ids: Rows that are looked up, whole numbers of any shape.

        Returns:
            The distinct rows, `[distinct, width]`, and the place among them of each id, in the shape of `ids`;
            None where the whole table is at hand anyway.
        """
        if not self.active or self._cache is not None or ids.numel() >= len(weight):
            return None
        distinct, places = torch.unique(ids, return_inverse=True)
        return self._ready(weight).channels(weight, self.bits, distinct), places

    def _ready(self, weight: Tensor) -> WeightBlock:
        if self.block is None:
            self.block = WeightBlock(weight.detach(), (self.bits,), self._group_size).to(weight.device)
        return self.block

    @property
    def group_size(self) -> int:
        """Inputs that share a step and a zero point; 0 for whole channels."""
        return self._group_size if self.block is None else self.block.group_size(self.bits)

    def calculate_qparams(self, **_: Any) -> tuple[Tensor, Tensor]:
        """Returns the step of every row and its zero point, rounded to a whole number."""
        if self.block is None:
            raise ModelError("This fake-quantizer has seen no weight yet. Run the model once first.")
        step, zero = self.block.step(self.bits).detach(), self.block.zero_point(self.bits)
        whole = torch.zeros_like(step) if zero is None else zero.detach().round()
        return step, whole.to(torch.int32)

    def integers(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns int8 integers, steps and zero points that `forward` stands for, from the same arithmetic."""
        return self._ready(weight).integers(weight, self.bits)


class HybridActivationFakeQuantize(HybridFakeQuantize):
    """Fake-quantizes a layer's input at the width in force; 16 lets it through.

    It calibrates itself on the first batch that it sees, unless `calibrate` ran before; a dynamic one has nothing
    to calibrate.

    Args:
        bits: The width in force.
        steps: Steps of every width; None makes those of `bits` alone.
        dynamic: Whether each row of the input gets a step and a zero point of its own, from its own values.
    """

    dtype = torch.quint8
    qscheme = torch.per_tensor_affine

    def __init__(
        self, bits: int = 8, steps: ActivationSteps | None = None, dynamic: bool = False, **_: Any
    ) -> None:
        super().__init__(bits)
        self.is_dynamic = dynamic
        self.steps = steps if steps is not None else ActivationSteps(() if dynamic else (bits,))
        self.activation_post_process = ActivationObserver(bits)
        self.observing = False
        self._calibrated = False

    def forward(self, x: Tensor) -> Tensor:
        """Returns the fake-quantized input, in the shape and dtype of `x`."""
        if self.bits == FLOAT_BITS and not self.observing:
            return x
        if self.is_dynamic:
            return fake_quantize_rows(x, self.bits) if self.active else x
        if self.observing:
            self.activation_post_process(x)
        elif not self._calibrated and not bool(self.steps.calibrated):
            self.activation_post_process(x)
            self.finish_calibration()
        if not self.active or self.bits == FLOAT_BITS:
            return x
        self._calibrated = self._calibrated or bool(self.steps.calibrated)
        quantized: Tensor = self.steps(x, self.bits)
        return quantized

    def finish_calibration(self) -> None:
        """Sets the steps of every width from what was observed, and forgets the observations.

        A layer that saw nothing (an expert that no token chose) is left to calibrate itself when it does.
        """
        if self.activation_post_process.values:
            self.steps.initialise({b: self.activation_post_process.qparams(b) for b in self.steps.widths})
        self.activation_post_process = ActivationObserver(self.bits)
        self.observing = False

    def calculate_qparams(self, **_: Any) -> tuple[Tensor, Tensor]:
        """Returns step and zero point of the width in force.

        Raises:
            ModelError: They are dynamic, and so not known before the input is.
        """
        if self.is_dynamic:
            raise ModelError("Steps of a dynamic activation are computed from each of its rows.")
        step, zero_point = self.steps.qparams(self.bits)
        return step.detach().reshape(1), zero_point.detach().round().to(torch.int32).reshape(1)


def _kind_of(module: nn.Module) -> str | None:
    return next((kind for kind, base in KINDS.items() if isinstance(module, base)), None)


def _class_of(module: nn.Module) -> Any:
    return type(module)


class _SwapToQAT:
    """What torch.ao's mapping asks `from_float` of: makes the QAT layer of a float layer."""

    @staticmethod
    def from_float(module: nn.Module) -> nn.Module:
        qconfig = module.qconfig
        prepared = adopt(module, qat_type(_class_of(module)))
        prepared.weight_fake_quant = qconfig.weight()  # type: ignore[operator, union-attr]
        prepared.weight_fake_quant.casts = not isinstance(module, nn.Embedding)
        prepared.activation_fake_quant = qconfig.activation()  # type: ignore[operator, union-attr]
        # torch.ao would add the activation's fake-quantizer to the layer's *output* as well; ours sits
        # at the input.
        prepared.qconfig = tq.QConfig(activation=nn.Identity, weight=qconfig.weight)  # type: ignore[union-attr]
        return prepared.train(module.training)


def prepare(
    model: nn.Module,
    policy: HybridPolicy,
    *,
    metaquantnet: MetaQuantNet | None = None,
    whole_zero_points: bool = False,
) -> nn.Module:
    """Returns a copy of a float model that trains under a policy, by torch.ao's `prepare_qat`.

    Args:
        model: Float model; it is not changed.
        policy: Widths of the layers to quantize; every other layer stays float.
        metaquantnet: Generates the weights and holds the activations' steps. None gives each layer its
            own learned steps, which is LSQ; activations are then calibrated on the first batch.
        whole_zero_points: Without a MetaQuantNet, whether zero points of groups are whole numbers.

    Returns:
        The prepared model, in the mode (train or eval) of `model`.

    Raises:
        PolicyError: The policy names a layer that the model lacks or that cannot be quantized so.
        ModelError: The model is prepared or packed already.
    """
    if not isinstance(policy, HybridPolicy):
        raise PolicyError(
            f"prepare takes a HybridPolicy, not a {type(policy).__name__}: HybridPolicy.from_json(...)."
        )
    if any(isinstance(module, (QATMixin, PackedModule)) for module in model.modules()):
        raise ModelError("The model is prepared or packed already. Give the float model that it was made from.")
    model = with_layers_of(copy.deepcopy(model), policy, inplace=True)
    modules = dict(model.named_modules())
    for module in modules.values():
        # torch.ao hands the QConfig of a layer on to what it holds that has none of its own, not even None.
        module.qconfig = None  # type: ignore[assignment]
    blocks: dict[int, WeightBlock] = {}
    for name, bits in policy.items():
        module = modules.get(name)
        if module is None or _kind_of(module) is None:
            what = "which the model lacks" if module is None else f"a {type(module).__name__}"
            raise PolicyError(
                f"The policy is for another model: it names {name!r}, {what}. Layers that can be quantized "
                "are Linear, Conv1d, Conv2d and Embedding."
            )
        if "forward" in vars(module):
            raise PolicyError(f"The policy names {name!r}, which cannot be quantized: {OWN_FORWARD}.")
        if isinstance(module, nn.Embedding) and bits.activation != FLOAT_BITS:
            raise PolicyError(
                f"The policy gives the input of {name!r} {bits.activation} bits, but an Embedding takes indices, "
                f"which are not quantized: LayerBits({bits.weight}, {FLOAT_BITS})."
            )
        if metaquantnet is not None:
            block = metaquantnet.block(name)
            steps = metaquantnet.activation_steps(name)
        else:
            weight = module._parameters["weight"]
            assert weight is not None
            # Tied weights share one block, or else they would not stay tied.
            if id(weight) not in blocks:
                table = WeightBlock(weight.detach(), (bits.weight,), bits.group_size, whole=whole_zero_points)
                blocks[id(weight)] = table.to(weight.device)
            block = blocks[id(weight)]
            made = block.widths[0], block.group_size(block.widths[0])
            if (bits.weight, bits.group_size) != made:
                raise PolicyError(
                    f"The policy gives {name!r} a weight of {bits.weight} bits in groups of {bits.group_size}, and "
                    f"another layer, which has the same weight, one of {made[0]} in groups of {made[1]} (0: whole "
                    "channels). Give both the same."
                )
            steps = ActivationSteps((bits.activation,)) if bits.static_input else None
        module.qconfig = _qconfig(bits, block, steps)  # type: ignore[assignment]
    training = {name: module.training for name, module in model.named_modules()}
    mapping = {type(modules[name]): _SwapToQAT for name in policy}
    prepared = _swap_all(model, mapping, lambda holder, m: tq.prepare_qat(holder, mapping=m, inplace=True))
    for name, module in prepared.named_modules():
        if name in training:
            module.training = training[name]
    return prepared


def _qconfig(bits: LayerBits, block: WeightBlock | None, steps: ActivationSteps | None) -> tq.QConfig:
    # Functions and not `with_args`: a deep copy of the model leaves them alone, and blocks stay shared.
    return tq.QConfig(
        activation=lambda **_: HybridActivationFakeQuantize(bits.activation, steps, bits.dynamic),
        weight=lambda **_: HybridWeightFakeQuantize(bits.weight, block, bits.group_size),
    )


def _swap_all(model: nn.Module, mapping: dict[type, Any], swap: Any) -> nn.Module:
    """Swaps by torch.ao, and also the root module and every further reference to a swapped module."""
    swapped: dict[int, nn.Module] = {}
    hooks: dict[int, dict[str, Any]] = {}
    originals = {id(module): module for module in model.modules()}

    def remember(handler: Any) -> type:
        class Remembering:
            @staticmethod
            def from_float(module: nn.Module) -> nn.Module:
                if id(module) not in swapped:
                    hooks[id(module)] = {name: vars(module)[name].copy() for name in HOOKS}
                    swapped[id(module)] = handler.from_float(module)
                return swapped[id(module)]

        return Remembering

    holder = nn.Module()
    holder.add_module("model", model)
    holder.train()
    with warnings.catch_warnings():
        # torch.ao's notice of its own removal is for those who call it; that is this file, knowingly.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        swap(holder, {float_type: remember(handler) for float_type, handler in mapping.items()})
    replaced = replace_modules(holder.get_submodule("model"), swapped)
    # What came in has the layer's hooks; torch.ao registers them once more, without their keywords.
    for key, new in swapped.items():
        for name, before in hooks[key].items():
            kept = vars(originals[key])[name]  # to which handles refer
            kept.clear()
            kept.update(before)
        take_over_hooks(new, originals[key])
    return replaced


def apply_policy(prepared: nn.Module, policy: HybridPolicy) -> None:
    """Puts the widths of a policy in force in a prepared model.

    Args:
        prepared: What `prepare` returned for a MetaQuantNet; one prepared for a policy has no other widths.
        policy: A width for every site that is to change.
    """
    for name, bits in policy.items():
        layer: Any = prepared.get_submodule(name)
        layer.weight_fake_quant.bits = bits.weight
        layer.activation_fake_quant.bits = bits.activation
        if bits.activation != FLOAT_BITS:  # a policy of float inputs does not say of which kind they would be
            layer.activation_fake_quant.is_dynamic = bits.dynamic


@contextmanager
def cached_weights(prepared: nn.Module) -> Iterator[None]:
    """Inside, every generated weight is computed once for each width; weights must not train."""
    quantizers = [m for m in prepared.modules() if isinstance(m, HybridWeightFakeQuantize)]
    for quantizer in quantizers:
        quantizer._cache = {}
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer._cache = None


@contextmanager
def calibration_kept(prepared: nn.Module) -> Iterator[None]:
    """Inside, inputs that no batch has reached yet may calibrate themselves; afterwards they wait again."""
    quantizers = [m for m in prepared.modules() if isinstance(m, HybridActivationFakeQuantize)]
    waiting = [q for q in quantizers if q.steps.widths and not bool(q.steps.calibrated)]
    kept = [
        (tensor, tensor.detach().clone()) for q in waiting for tensor in q.steps.state_dict(keep_vars=True).values()
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, before in kept:
                tensor.copy_(before)
        for quantizer in waiting:
            quantizer._calibrated = False


@contextmanager
def calibrate(prepared: nn.Module) -> Iterator[None]:
    """Inside, a prepared model runs in float and observes its activations; then all steps are set.

    Args:
        prepared: What `prepare` returned: run it on a few batches inside.
    """
    quantizers = [m for m in prepared.modules() if isinstance(m, HybridActivationFakeQuantize)]
    for quantizer in quantizers:
        quantizer.observing = bool(quantizer.steps.widths)
    try:
        with float_forward(prepared):
            yield
    finally:
        for quantizer in quantizers:
            if quantizer.observing:
                quantizer.finish_calibration()


@contextmanager
def float_forward(prepared: nn.Module) -> Iterator[None]:
    """Inside, a prepared model runs in float: its fake-quantizers let everything through."""
    enabled = [m for m in prepared.modules() if isinstance(m, FakeQuantizeBase) and bool(m.fake_quant_enabled[0])]
    for quantizer in enabled:
        quantizer.disable_fake_quant()
    try:
        yield
    finally:
        for quantizer in enabled:
            quantizer.enable_fake_quant()


class _SwapToPacked:
    """What torch.ao's mapping asks `from_float` of: makes the packed layer of a QAT layer."""

    def __init__(self) -> None:
        # The weight is kept beside its packed layer, so that its id stays its own.
        self._first: dict[int, tuple[Tensor, PackedModule]] = {}

    def from_float(self, module: Any) -> nn.Module:
        if isinstance(module, QATMixin):
            weight = module._parameters["weight"]
            assert weight is not None
            return self._pack(module, weight, module._float_type)
        return self._from_graph(module)

    def _pack(self, module: Any, weight: Tensor, float_type: type[nn.Module]) -> nn.Module:
        quantizer: HybridWeightFakeQuantize = module.weight_fake_quant
        activation: HybridActivationFakeQuantize | None = getattr(module, "activation_fake_quant", None)
        width_in = FLOAT_BITS if activation is None else activation.bits
        dynamic = activation is not None and activation.is_dynamic and width_in != FLOAT_BITS
        bits = LayerBits(quantizer.bits, width_in, quantizer.group_size, dynamic)
        step_in = zero_point = None
        if activation is not None and bits.static_input:
            step_in, zero_point = (part.reshape(()) for part in activation.calculate_qparams())
        integers, step, zero = quantizer.integers(weight)
        packed = PackedModule.from_integers(
            module,
            integers,
            step,
            bits,
            step_in,
            zero_point,
            zero=zero,
            float_type=float_type,
            drop=("weight_fake_quant", "activation_fake_quant", "activation_post_process"),
        )
        _, first = self._first.setdefault(id(weight), (weight, packed))
        if first is not packed:
            share_packed_weight(first, packed)
        return packed  # type: ignore[return-value]

    def _from_graph(self, module: Any) -> nn.Module:
        """Packs a QAT layer that torch.ao's graph mode made: its BatchNorm is folded, its ReLU follows."""
        weight, bias = module.weight.detach(), module.bias
        float_type = next(base for base in (nn.Linear, nn.Conv1d, nn.Conv2d) if isinstance(module, base))
        if hasattr(module, "bn"):
            bn = module.bn
            fuse = fuse_linear_bn_weights if float_type is nn.Linear else fuse_conv_bn_weights
            weight, bias = fuse(weight, bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias)
        shell = adopt(module, float_type)
        shell._modules = {"weight_fake_quant": module.weight_fake_quant}
        shell._parameters["bias"] = None if bias is None else nn.Parameter(bias.detach())
        packed = self._pack(shell, weight, float_type)
        return nn.Sequential(packed, nn.ReLU()) if type(module) in _GRAPH_RELU else packed


_GRAPH_RELU = (nniqat.LinearReLU, nniqat.ConvReLU2d, nniqat.ConvBnReLU1d, nniqat.ConvBnReLU2d)
_GRAPH = (
    nnqat.Linear,
    nnqat.Conv1d,
    nnqat.Conv2d,
    nniqat.LinearBn1d,
    nniqat.ConvBn1d,
    nniqat.ConvBn2d,
    *_GRAPH_RELU,
)


def convert(prepared: nn.Module) -> nn.Module:
    """Returns a packed copy of a prepared model, by torch.ao's `convert`.

    BatchNorm layers are folded into one scale and one shift a channel. The outputs equal those of the
    prepared model in eval mode up to the rounding of that fold. A model that torch.ao's own
    `prepare_qat_fx` prepared with `get_qconfig_mapping` is accepted as well; the fake-quantizers of its
    activations stay in its graph.

    Args:
        prepared: What `prepare` returned, trained or not, after a batch at least; it is not changed.

    Returns:
        The converted model in eval mode, without gradients.

    Raises:
        ModelError: The model holds no layer that `prepare` made, no input of one was ever seen, or torch.ao's graph
            mode made a layer that cannot be packed.
    """
    _check_calibrated(prepared)
    with torch.no_grad():  # else copies of parts in TorchScript are results that have a gradient
        converted = copy.deepcopy(prepared).eval()
    types = {type(m) for m in converted.modules() if isinstance(m, (QATMixin, *_GRAPH))}
    if not types:
        raise ModelError("The model holds no prepared layer. Call hq_plugin.torch_ao.prepare on it first.")
    swapper = _SwapToPacked()
    converted = _swap_all(
        converted,
        dict.fromkeys(types, swapper),
        lambda holder, mapping: tq.convert(holder, mapping=mapping, inplace=True),
    )
    quantizers = [n for n, m in converted.named_modules() if isinstance(m, HybridWeightFakeQuantize)]
    if left := [name.rpartition(".")[0] for name in quantizers]:
        kinds = {type(converted.get_submodule(name)).__name__ for name in left}
        raise ModelError(
            f"{', '.join(left[:5])} cannot be packed: torch.ao made a {', '.join(sorted(kinds))} of it. "
            "Leave such layers out of the policy."
        )
    fold_batchnorm(converted)
    return converted.eval().requires_grad_(False)


def _check_calibrated(prepared: nn.Module) -> None:
    """Checks that steps of inputs come from inputs: those of a model that has never run are made up."""
    static = {
        name: layer.activation_fake_quant
        for name, layer in qat_layers(prepared).items()
        if isinstance(layer.activation_fake_quant, HybridActivationFakeQuantize)
        and layer.activation_fake_quant.bits != FLOAT_BITS
        and not layer.activation_fake_quant.is_dynamic
    }
    unseen = [name for name, quantizer in static.items() if not bool(quantizer.steps.calibrated)]
    if unseen and len(unseen) == len(static):
        raise ModelError(
            f"The inputs of {', '.join(unseen[:5])} have no steps yet. Run the prepared model on a batch, or on "
            "several inside hq_plugin.torch_ao.calibrate(prepared), before it is converted. (A layer whose weight "
            "is read around its forward has no input of its own: give it 16 bits for that.)"
        )
    if unseen:
        warnings.warn(
            f"The prepared model never ran {', '.join(unseen[:5])}: the steps of their inputs are made up.",
            HQWarning,
            stacklevel=3,
        )


def get_qconfig_mapping(policy: HybridPolicy) -> tq.QConfigMapping:
    """Returns a policy as torch.ao's QConfigMapping, for your own torch.ao QAT loop.

    For `prepare_qat_fx(model, get_qconfig_mapping(policy), example_inputs)`. Steps start on the first
    batch, so run one forward before you make the optimizer; `hq_plugin.torch_ao.convert` packs the
    result. In graph mode torch.ao may quantize a layer's input at its producer's width, and it refuses
    embeddings: leave them out of the policy.

    Args:
        policy: Widths of the layers; others stay float.

    Raises:
        PolicyError: The policy has dynamic activations.
    """
    mapping = tq.QConfigMapping().set_global(None)
    for name, bits in policy.items():
        if bits.dynamic:
            raise PolicyError(
                f"The policy gives {name!r} dynamic activations, which torch.ao's graph mode cannot train. Use "
                'hq_plugin.torch_ao.prepare, or a policy with activation_scheme="static".'
            )
        mapping = mapping.set_module_name(name, _qconfig(bits, None, None))
    return mapping
