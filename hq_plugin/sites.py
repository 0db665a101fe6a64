"""Finds the quantizable layers ("sites") of any `nn.Module`, by behaviour and not by exact type.

A site is a Linear, Conv1d, Conv2d or Embedding, or a subclass of one, or a held parameter, whose weight is
used in a probe forward. What is left float is listed with its reason. Nothing here knows about bit widths.
"""

from __future__ import annotations

import fnmatch
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from hq_plugin.batchnorm import norms_to_fold
from hq_plugin.errors import ConfigError, ModelError
from hq_plugin.nn.held import HeldWeight
from hq_plugin.nn.split import BASIS, place_bytes, split_embeddings
from hq_plugin.probe import probe

#: Why a layer with a `forward` of its own stays float: what is bound to the layer does not move to another.
OWN_FORWARD = "its forward was replaced on the instance (by hand, or by hooks of accelerate)"
#: Base class of each kind of site. Transposed and 3-D convolutions are not subclasses of these.
KINDS: dict[str, type[nn.Module]] = {
    "linear": nn.Linear,
    "conv1d": nn.Conv1d,
    "conv2d": nn.Conv2d,
    "embedding": nn.Embedding,
    "held": HeldWeight,
}


@dataclass(frozen=True)
class Site:
    """One quantizable layer.

    Attributes:
        name: Qualified module name, the key in a policy.
        kind: `"linear"`, `"conv1d"`, `"conv2d"`, `"embedding"`, or `"held"` for a parameter of a module.
        weight_shape: Shape of the weight; axis 0 is the quantization channel.
        macs: Multiply-accumulates of one sample; 0 for an embedding.
        input_numel: Elements of the layer's input, of one sample.
        group: Sites of one group share one width. Sites with tied weights share a group.
        owner: The first site that uses the same weight tensor: itself, unless weights are tied.
        type_name: Name of the module's class, for reports.
        called: Whether the layer itself runs. Otherwise its weight is read by other code, and there is no
            input to quantize.
        place_bytes: Bytes that say where the rows of a table of a split embedding are.
        added: Whether the float model has no such weight: it turns back the rows of a split embedding.
        may_be_left_out: Whether a width of 0 is possible: for blocks of a table's columns.
    """

    name: str
    kind: str
    weight_shape: tuple[int, ...]
    macs: int
    input_numel: int
    group: str
    owner: str
    type_name: str
    called: bool = True
    place_bytes: int = 0
    added: bool = False
    may_be_left_out: bool = False

    @property
    def channels(self) -> int:
        """How many steps the weight has, one a channel."""
        return self.weight_shape[0]

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.weight_shape)

    @property
    def quantizes_input(self) -> bool:
        """Whether the layer has a floating-point input to quantize."""
        return self.called and self.kind not in ("embedding", "held")

    def takes_groups(self, size: int) -> bool:
        """Whether groups of so many inputs can have steps of their own: in linear layers, embeddings and held
        parameters whose inputs the size divides.
        """
        return self.kind in ("linear", "embedding", "held") and self.weight_shape[-1] % size == 0


@dataclass(frozen=True)
class FloatLayer:
    """A layer with parameters that stays in floating point, and why."""

    name: str
    type_name: str
    parameters: int
    reason: str


@dataclass(frozen=True)
class SiteTable:
    """All sites of a model in execution-independent (registration) order, and what is left over.

    Attributes:
        sites: The quantizable layers.
        float_layers: Layers with parameters that are not sites, each with its reason.
        float_bytes: Bytes of the float model: parameters and persistent buffers, shared ones once.
        rest_bytes: Bytes of what stays float beside the sites' weights, once BatchNorm is folded into
            one scale and one shift a channel.
    """

    sites: tuple[Site, ...]
    float_layers: tuple[FloatLayer, ...]
    float_bytes: int
    rest_bytes: int
    _by_name: dict[str, Site] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_name", {site.name: site for site in self.sites})

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __getitem__(self, name: str) -> Site:
        return self._by_name[name]

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    @property
    def groups(self) -> dict[str, list[Site]]:
        """Group name to its sites, in order."""
        groups: dict[str, list[Site]] = {}
        for site in self.sites:
            groups.setdefault(site.group, []).append(site)
        return groups

    @property
    def weights(self) -> int:
        """Number of quantizable weights of the float model, tied ones once."""
        return sum(site.numel for site in self.sites if site.owner == site.name and not site.added)


def find_sites(
    model: nn.Module,
    run: Callable[[nn.Module], Any],
    batch_size: int,
    *,
    exclude: Sequence[str] = (),
) -> SiteTable:
    """Finds the sites of `model` by one probe forward in eval mode, without gradients.

    Args:
        model: Any module. It is left as it was.
        run: Runs the model once on one batch: `lambda model: model(batch)`.
        batch_size: Samples in that batch; MACs and input sizes are divided by it.
        exclude: Names or shell patterns of layers that stay float, or of modules all of whose layers do.

    Raises:
        ModelError: The model has nothing to quantize, or an uninitialised (lazy) parameter.
        ConfigError: A pattern of `exclude` matches no module.
    """
    reject_lazy(model)
    modules = {name: module for name, module in model.named_modules() if _has_own_parameters(module)}
    _check_patterns(exclude, [name for name, _ in model.named_modules()])
    folded = set(norms_to_fold(model))
    reasons: dict[str, str] = {}
    candidates: dict[str, tuple[str, nn.Module]] = {}
    for name, module in modules.items():
        kind, reason = _kind_of(name, module, exclude, module in folded)
        if kind:
            candidates[name] = (kind, module)
        else:
            reasons[name] = reason
    seen = probe(model, candidates, {id(m.weight): m.weight for _, m in candidates.values()}, run)  # type: ignore[misc]
    called, calls = set(seen.calls), seen.calls
    # A layer that never runs itself is a site if its weight is used: by others (T5's `shared`), or because
    # something reads it around the layer (BEiT's `F.linear(x, self.qkv.weight)`).
    used = {id(candidates[name][1].weight) for name in calls}
    for name, (kind, module) in list(candidates.items()):
        if name in calls and kind != "held":
            continue
        if name not in calls and id(module.weight) in used:
            calls[name] = (0, 0)
        elif id(module.weight) in seen.reads:
            calls[name] = (seen.reads[id(module.weight)], 0)
        else:
            calls.pop(name, None)
            reasons[name] = (
                "never used in the probe forward with these inputs, or what is computed of its weight alone is"
            )
            del candidates[name]
    _reject_shared_weights(model, candidates, reasons)

    sites: list[Site] = []
    owners: dict[int, str] = {}
    places, split = place_bytes(model), split_embeddings(model)
    added = {f"{name}.{BASIS}" for name in split}
    blocks = {id(block) for whole in split.values() if whole.basis is not None for block in whole.parts.modules()}
    for name, (kind, module) in candidates.items():
        weight: Tensor = module.weight  # type: ignore[assignment]
        owner = owners.setdefault(id(weight), name)
        macs, numel = calls[name]
        sites.append(
            Site(
                name=name,
                kind=kind,
                weight_shape=tuple(weight.shape),
                macs=macs // batch_size,
                input_numel=numel // batch_size,
                group=owner,
                owner=owner,
                type_name=type(module).__name__,
                called=name in called,
                place_bytes=places.get(name, 0),
                added=name in added,
                may_be_left_out=id(module) in blocks,
            )
        )
    if not sites:
        raise ModelError(_nothing_to_quantize(reasons, modules))
    float_layers = tuple(
        FloatLayer(name, type(modules[name]).__name__, _own_parameters(modules[name]), reason)
        for name, reason in reasons.items()
    )
    total, rest = _count_bytes(model, sites, folded)
    return SiteTable(tuple(sites), float_layers, total, rest)


def _has_own_parameters(module: nn.Module) -> bool:
    return any(parameter is not None for parameter in module._parameters.values()) or (
        parametrize.is_parametrized(module)
    )


def _own_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters(recurse=False))


def excluded(name: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern matches the name of a layer, or of a module that it lies in."""
    inside = itertools.accumulate(name.split("."), lambda outer, part: f"{outer}.{part}")
    return any(fnmatch.fnmatchcase(outer, pattern) for outer in inside for pattern in patterns)


def _kind_of(name: str, module: nn.Module, exclude: Sequence[str], folds: bool) -> tuple[str | None, str]:
    """Returns the kind of site, or None and the reason why the layer stays float."""
    if excluded(name, exclude):
        return None, "excluded by the configuration"
    kind = next((kind for kind, base in KINDS.items() if isinstance(module, base)), None)
    if kind is None:
        if folds:
            return None, "BatchNorm: folded into one scale and one shift a channel at convert"
        return None, f"{type(module).__name__} is not a Linear, Conv1d, Conv2d or Embedding"
    if "forward" in vars(module):
        return None, OWN_FORWARD
    if parametrize.is_parametrized(module):
        return None, "its weight is parametrized; torch.nn.utils.parametrize.remove_parametrizations first"
    weight = module._parameters.get("weight")
    if weight is None:
        return None, "it has no weight parameter of its own"
    if not weight.is_floating_point() or weight.numel() == 0:
        return None, f"its weight is {weight.dtype} with {weight.numel()} elements"
    return kind, ""


def reject_lazy(model: nn.Module) -> None:
    """Checks that every parameter has values.

    Raises:
        ModelError: A lazy one has none yet.
    """
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            layer = name.rpartition(".")[0]
            raise ModelError(
                f"Layer {layer!r} has an uninitialised (lazy) parameter. Run the model once on a batch first."
            )


def _check_patterns(patterns: Sequence[str], names: Sequence[str]) -> None:
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            some = ", ".join(name for name in names if name)[:200]
            raise ConfigError(f"exclude pattern {pattern!r} matches no module. Modules are: {some} ...")


def _reject_shared_weights(
    model: nn.Module, candidates: dict[str, tuple[str, nn.Module]], reasons: dict[str, str]
) -> None:
    """Keeps a weight float that is also a parameter of a layer that is not a site: it must stay tied."""
    site_modules = {id(module) for _, module in candidates.values()}
    foreign = {
        id(parameter): f"{name}.{own}" if id(module) in site_modules else name
        for name, module in model.named_modules()
        for own, parameter in module._parameters.items()
        if parameter is not None and (id(module) not in site_modules or own != "weight")
    }
    for name, (_, module) in list(candidates.items()):
        other = foreign.get(id(module.weight))
        if other is not None:
            reasons[name] = f"its weight is tied to {other!r}, which is not quantizable"
            del candidates[name]


def _nothing_to_quantize(reasons: dict[str, str], modules: dict[str, nn.Module]) -> str:
    if not modules:
        return "The model has no parameters, so there is nothing to quantize."
    listed = "; ".join(f"{name or '(root)'}: {reason}" for name, reason in list(reasons.items())[:5])
    return (
        "The model has nothing to quantize: no Linear, Conv1d, Conv2d or Embedding layer that runs. "
        f"What was found: {listed}{' ...' if len(reasons) > 5 else ''}"
    )


def _count_bytes(model: nn.Module, sites: Sequence[Site], folded: Iterable[nn.Module]) -> tuple[int, int]:
    """Returns the bytes of the float model, and of what stays float once BatchNorm is folded."""
    persistent = model.state_dict(keep_vars=True)
    # The float model has one table; what several need beside their rows counts as theirs.
    split = split_embeddings(model).values()
    places = {id(module.places) for module in split}
    tensors = {id(t): t for t in persistent.values() if isinstance(t, Tensor) and id(t) not in places}
    added = {id(module.basis.weight) for module in split if module.basis is not None}
    total = sum(t.numel() * t.element_size() for key, t in tensors.items() if key not in added)
    gone = {id(model.get_submodule(site.name).weight) for site in sites}
    for norm in folded:
        gone.update(id(tensor) for tensor in norm._buffers.values())
    rest = sum(tensor.numel() * tensor.element_size() for key, tensor in tensors.items() if key not in gone)
    return total, rest
