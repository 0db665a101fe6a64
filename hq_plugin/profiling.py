"""Measures how long each layer of a model takes at each width on this machine (`profiles.py`).

Each distinct layer is timed alone at each of its widths. Their sum is not yet the time of the model: what stays
float comes on top, and a runtime fuses layers. Both are taken from the whole model, timed under a few policies.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hq_plugin import torch_ao
from hq_plugin.batch import Batch
from hq_plugin.budget import Budget
from hq_plugin.config import Config
from hq_plugin.cost import CostTable, Table
from hq_plugin.distribution import in_first
from hq_plugin.errors import ConfigError, EngineError
from hq_plugin.kernels import choose_by, measure
from hq_plugin.nn import PackedModule
from hq_plugin.policy import HybridPolicy, LayerBits
from hq_plugin.preparation import device_of
from hq_plugin.probe import first_inputs
from hq_plugin.profiles import Profile, engine_versions, runtime, signature, where, width
from hq_plugin.progress import progress
from hq_plugin.quantization import weight_range, weight_rows
from hq_plugin.space import Genome, SearchSpace
from hq_plugin.timing import MODEL_SECONDS, OtherMemory, median_milliseconds

#: Stands for the kernel of a layer that did not run.
NO_KERNEL = "none"
#: Mean width of policies, roughly: it says how many bytes a model reads between two runs of a layer.
_TYPICAL_BITS = 4
#: The slope of the model's time over the sum of its layers' is believed within these bounds.
_SLOPE = (0.25, 4.0)
#: What a slope of 2 in place of 1 counts beside the squared relative error of one policy.
_PRIOR = 3e-3


@torch.no_grad()
def measure_profile(
    teacher: nn.Module, space: SearchSpace, batch: Batch, samples: int, target: str, show: bool | None = None
) -> Profile:
    """Measures a model on this machine.

    Args:
        teacher: The float model, in eval mode.
        space: Gives the layers and their widths.
        batch: Inputs; the first `samples` of them are run.
        samples: Samples of a forward.
        target: `"torch"` (also for `"storage"`) or `"onnxruntime"`.
        show: Whether to show progress; None does on a terminal.

    Raises:
        EngineError: The target is ONNX Runtime, which is not installed.
        ExportError: The target is ONNX Runtime, and the model cannot be exported.
    """
    layer_time, model_time = _timers(target, space, device_of(teacher))
    part = first_samples(batch, samples)
    layers_of_sites = {site.name: teacher.get_submodule(site.name) for site in space.table}
    inputs = first_inputs(layers_of_sites, lambda: part.run(teacher), keywords=True)
    layers: dict[str, dict[str, dict[str, float]]] = {}
    with progress(show) as bars:
        task = bars.task("profile", len(space.table))
        for group in space.groups:
            for site in group.sites:
                times = layers.setdefault(signature(site), {})
                for w in range(len(group.weight_bits)):
                    for a in range(len(group.activation_bits)):
                        bits = group.bits(site, w, a)
                        if width(bits) not in times:
                            x = inputs.get(site.name)
                            module = teacher.get_submodule(site.name)
                            layer = random_layer(module, bits)
                            times[width(bits)] = {NO_KERNEL: 0.0} if x is None else layer_time(layer, x)
                task.advance()
    made = Profile(
        runtime(target),
        samples,
        where(target, device_of(teacher)),
        datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        engine_versions(target),
        0.0,
        {},
        0.0,
        layers,
    )
    even, mixed = _spread(made.table(space), space)
    policies = [space.policy(genome) for genome in (*even, *mixed)]
    sums = [made.sums(space, policy) for policy in policies]
    totals = [model_time(_packed(teacher, policy, part), part) for policy in policies]
    # Where inputs change between layers a runtime converts, which no layer's time has: such policies do not tell
    # what the others take, but they tell by how much the sum may be off.
    rest, slopes = _fit(sums[: len(even)], totals[: len(even)])
    fitted = replace(made, rest=rest, slopes=slopes)
    error = max(abs(total / fitted.milliseconds(part) - 1) for total, part in zip(totals, sums, strict=True))
    return replace(fitted, error=error)


@torch.no_grad()
def policy_milliseconds(
    teacher: nn.Module, space: SearchSpace, policy: HybridPolicy, batch: Batch, samples: int, target: str
) -> float:
    """Times a whole model under a policy; its weights are rounded, and not trained.

    Args:
        teacher: The float model, in eval mode.
        space: Gives the layers.
        policy: Their widths.
        batch: Inputs; the first `samples` of them are run.
        samples: Samples of a forward.
        target: As for `measure_profile`.
    """
    _, model_time = _timers(target, space, device_of(teacher))
    part = first_samples(batch, samples)
    return model_time(_packed(teacher, policy, part), part)


def _packed(teacher: nn.Module, policy: HybridPolicy, batch: Batch) -> nn.Module:
    """Returns a packed model that runs as a finished one would: a runtime fuses layers by their inputs' ranges."""
    prepared = torch_ao.prepare(teacher, policy, whole_zero_points=True)
    batch.run(prepared)  # observes the ranges
    return torch_ao.convert(prepared)


def _spread(times: Table, space: SearchSpace) -> tuple[list[Genome], list[Genome]]:
    """Returns policies to time the model under.

    Returns:
        Those that give all layers one width of inputs, and others: the narrowest and the widest weights at each
        width of inputs, the fastest widths of each layer alone, and a policy at random.
    """
    genomes = []
    for activation in range(int(space.top[:, 1].max()) + 1):
        for weights in (np.zeros_like(space.top[:, 0]), space.top[:, 0]):
            genomes.append(np.stack([weights, np.minimum(activation, space.top[:, 1])], axis=1))
    fastest = times.reshape(len(times), -1).argmin(axis=1)
    genomes.append(np.stack(np.unravel_index(fastest, times.shape[1:]), axis=1))
    genomes.append(np.random.RandomState(0).randint(0, space.top + 1))
    distinct = list({genome.tobytes(): genome for genome in genomes}.values())
    chosen = space.top[:, 1] > 0
    even = [len(set(genome[chosen, 1].tolist())) <= 1 for genome in distinct]
    return (
        [genome for genome, one_width in zip(distinct, even, strict=True) if one_width],
        [genome for genome, one_width in zip(distinct, even, strict=True) if not one_width],
    )


def _fit(sums: Sequence[Mapping[str, float]], totals: Sequence[float]) -> tuple[float, dict[str, float]]:
    """Returns rest and slopes of the model's time over its layers', of least squared relative error.

    Args:
        sums: Milliseconds of the layers under each policy, by the width of their inputs.
        totals: Those of the model.
    """
    from scipy.optimize import lsq_linear  # which takes half a second to import, and few profile

    widths = sorted({bits for each in sums for bits in each})
    rows = np.array([[1.0, *(each.get(bits, 0.0) for bits in widths)] for each in sums])
    wanted = np.ones(len(rows))
    # Where sums hardly differ they tell no slope: a layer is then believed to take what it takes alone.
    prior = np.sqrt(_PRIOR) * np.eye(len(widths) + 1)[1:]
    found = lsq_linear(
        np.concatenate([rows / np.array(totals)[:, None], prior]),
        np.concatenate([wanted, np.full(len(widths), np.sqrt(_PRIOR))]),
        bounds=([0.0] + [_SLOPE[0]] * len(widths), [np.inf] + [_SLOPE[1]] * len(widths)),
    ).x
    return float(found[0]), {bits: float(slope) for bits, slope in zip(widths, found[1:], strict=True)}


def with_latency(costs: CostTable, budget: Budget, teacher: nn.Module, batch: Batch, config: Config) -> None:
    """Gives a cost table the latency of its choices, where a budget limits it.

    The profile is the one of the configuration, or is measured now, once for each number of samples.

    Args:
        costs: Changed in place.
        budget: A budget.
        teacher: The float model, in eval mode.
        batch: Inputs to measure on.
        config: Gives `profile`, `target` and `progress`.

    Raises:
        ConfigError: The profile is of another target, of another number of samples, or lacks a layer or a width.
    """
    if budget.latency_ms is None or costs.latency_batch == budget.batch:
        return
    given = config.profile
    if given is None:
        # Two processes never measure the same, and all of them must plan alike.
        profile = in_first(
            lambda: measure_profile(teacher, costs.space, batch, budget.batch, config.target, config.progress)
        )
    else:
        profile = given if isinstance(given, Profile) else Profile.load(given)
        profile.check_target(config.target)
        profile.warn_if_foreign(device_of(teacher))
        if profile.batch != budget.batch:
            raise ConfigError(
                f"The profile is of {profile.batch} samples a forward, the budget of {budget.batch}. Measure one "
                f'for that, or write the budget as "{budget.latency_ms:g}ms for {profile.batch} samples".'
            )
    profile.warn_if_rough()
    profile.put_into(costs)


LayerTimer = Callable[[PackedModule, Tensor], dict[str, float]]
ModelTimer = Callable[[nn.Module, Batch], float]


def _timers(target: str, space: SearchSpace, device: torch.device) -> tuple[LayerTimer, ModelTimer]:
    if target == "onnxruntime":
        try:
            from hq_plugin.integrations.onnxruntime.timing import layer_milliseconds, model_milliseconds
        except ImportError as error:
            raise EngineError(
                f"{error}. Install what ONNX Runtime needs: pip install 'hq-plugin[onnx]'."
            ) from error
        return layer_milliseconds, model_milliseconds
    # As where kernels are chosen: between two runs of a layer, the bytes of the rest are read.
    others = OtherMemory(space.table.weights * _TYPICAL_BITS // 8, device)
    return lambda layer, x: measure(layer, x, others).milliseconds, _torch_model


def _torch_model(model: nn.Module, batch: Batch) -> float:
    choose_by(model, lambda: batch.run_whole(model))
    return median_milliseconds(lambda: batch.run(model), seconds=MODEL_SECONDS)


def random_layer(module: nn.Module, bits: LayerBits) -> PackedModule:
    """Returns a packed layer of a float layer's shape with random integers, to be timed."""
    weight = module._parameters["weight"]
    assert weight is not None
    low, high = weight_range(bits.weight)
    integers = torch.randint(low, high + 1, weight.shape, dtype=torch.int8, device=weight.device)
    rows = weight_rows(weight, bits.group_size).shape[0]
    offset = 0.5 if bits.weight <= 2 else 0.0  # a whole zero point, as fast kernels have
    zero = torch.full((rows,), offset, device=weight.device) if bits.group_size else None
    quantized = bits.static_input
    return PackedModule.from_integers(
        module,
        integers,
        torch.full((rows,), 0.01, device=weight.device),
        bits,
        torch.tensor(0.05) if quantized else None,
        torch.tensor(2 ** (bits.activation - 1)) if quantized else None,
        zero=zero,
    )


def first_samples(batch: Batch, samples: int) -> Batch:
    """Returns the first samples of a batch, repeated where it has fewer."""

    def of(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] != batch.size:
            return value
        index = torch.arange(samples, device=value.device) % batch.size
        return value[index]

    kwargs: Mapping[str, Any] = {name: of(value) for name, value in batch.kwargs.items()}
    return Batch(tuple(of(value) for value in batch.args), dict(kwargs), None, samples)
