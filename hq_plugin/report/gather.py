"""Gathers the data of a report from a `Result`, also from one that an earlier version saved."""

from __future__ import annotations

import math
from typing import Any

from hq_plugin.budget import LIMITS
from hq_plugin.policy import FLOAT_BITS
from hq_plugin.quantization import activation_range
from hq_plugin.report.document import (
    AXES,
    Candidate,
    Document,
    FloatLayers,
    FrontPoint,
    Layer,
    Limit,
    Policy,
    Stage,
)
from hq_plugin.result import Costs, LayerReport, Result, Sensitivity

#: Names for people of what the search compares.
CANDIDATES = {
    "uniform": "best uniform policy",
    "dynamic_programming": "dynamic programming",
    "searched": "genetic search",
    "given": "given policy",
}
#: The stages in their order, those inside another one with its name.
STAGES = {
    "sensitivities": "sensitivities",
    "meta_training": "meta-training",
    "search": "search",
    "search_scoring": "search: scoring policies",
    "search_overhead": "search: choosing what to score",
    "search_reranking": "search: the best on more data",
    "finetune": "fine-tuning",
    "convert": "conversion",
}


def gather(result: Result) -> Document:
    """Returns the document of a result."""
    axis = {"size_fraction": "size"}.get(next(iter(result.used), ""), next(iter(result.used), "weight_bits"))
    groups = {name: group for group in result.sensitivities for name in group.sites}
    records = result.history.get("search", [])
    scored = max((int(record["evaluation"]) + 1 for record in records), default=0)
    return Document(
        model=result.model or "model",
        budget=result.budget,
        chosen=result.chosen,
        chosen_label=CANDIDATES.get(result.chosen, result.chosen),
        distance_name=result.distance or "distance to the float model",
        agreement=result.agreement,
        float_size=result.float_size,
        limits=tuple(_limits(result)),
        candidates=tuple(_candidates(result)),
        layers=tuple(_layer(result, layer, groups.get(layer.name)) for layer in result.layers),
        front_axis=axis if axis in AXES else "weight_bits",
        front=tuple(FrontPoint(**point) for point in result.front),
        policies=tuple(_policy(record) for record in records),
        policies_scored=scored,
        training={
            name: tuple((int(record["step"]), float(record["loss"])) for record in result.history.get(name, []))
            for name in ("meta_training", "finetune")
        },
        float_layers=tuple(_float_layers(result)),
        stages=tuple(_stages(result)),
        versions=dict(result.versions),
        seed=result.config.get("seed"),
        config=dict(result.config),
        gaps=tuple(_gaps(result, scored)),
    )


def _limits(result: Result) -> list[Limit]:
    limits = []
    for name, share in result.used.items():
        spent = getattr(result.costs, "size" if name == "size_fraction" else name, None)
        if spent is None:
            continue
        # Shares count everything that the limit does, so that they give the limit back, but for the last digits.
        limit = float(f"{spent / max(share, 1e-12):.12g}")
        limits.append(Limit(name, LIMITS.get(name, name), limit, float(spent), share))
    return limits


def _candidates(result: Result) -> list[Candidate]:
    def candidate(
        name: str, label: str, costs: Costs, distance: float, accuracy: float | None, metric: float | None
    ) -> Candidate:
        return Candidate(
            name=name,
            label=label,
            distance=distance,
            accuracy=accuracy,
            metric=metric,
            weight_bits=costs.weight_bits,
            size=costs.size,
            bitops=costs.bitops,
            energy_uj=costs.energy_uj,
            latency_ms=costs.latency_ms,
            chosen=name == result.chosen,
        )

    float_model = Candidate(
        name="float",
        label="float model",
        distance=0.0,
        accuracy=result.float_accuracy,
        metric=result.float_metric,
        weight_bits=None,
        size=result.float_size,
        bitops=None,
        energy_uj=None,
        latency_ms=None,
        chosen=False,
    )
    order = ["uniform", "dynamic_programming", "searched"]
    baselines = sorted(result.baselines.values(), key=lambda b: order.index(b.name) if b.name in order else 9)
    return [
        float_model,
        *(
            candidate(b.name, CANDIDATES.get(b.name, b.name), b.costs, b.kl, b.accuracy, b.metric)
            for b in baselines
        ),
        candidate("result", "result, fine-tuned", result.costs, result.kl, result.accuracy, result.metric),
    ]


def _layer(result: Result, layer: LayerReport, group: Sensitivity | None) -> Layer:
    bits = result.policy[layer.name]
    low = high = None
    if layer.activation_step is not None and layer.activation_zero_point is not None:
        least, most = activation_range(layer.activation_bits)
        low = (least - layer.activation_zero_point) * layer.activation_step
        high = (most - layer.activation_zero_point) * layer.activation_step
    rise = None
    if group is not None:
        # A layer whose input cannot be quantized is float, whatever width its group has.
        activation = layer.activation_bits
        if activation == FLOAT_BITS and activation not in group.activation_bits:
            activation = group.activation_bits[-1]
        rise = group.rise(layer.weight_bits, activation)
    return Layer(
        name=layer.name,
        kind=layer.kind,
        shape=layer.shape,
        weights=math.prod(layer.shape),
        weight_bits=layer.weight_bits,
        activation_bits=layer.activation_bits,
        dynamic=bits.dynamic,
        group_size=bits.group_size,
        size=layer.size,
        bitops=layer.bitops,
        shares_with=() if group is None else tuple(name for name in group.sites if name != layer.name),
        sensitivity=rise,
        sensitivities={} if group is None else dict(zip(group.weight_bits, group.weight, strict=True)),
        activation_step=layer.activation_step,
        activation_zero_point=layer.activation_zero_point,
        activation_low=low,
        activation_high=high,
    )


def _policy(record: dict[str, Any]) -> Policy:
    score = float(record["score"])
    return Policy(
        evaluation=int(record["evaluation"]),
        score=score if math.isfinite(score) else None,
        weight_bits=record.get("weight_bits"),
        size=record.get("size"),
        bitops=record.get("bitops"),
        energy_uj=record.get("energy_uj"),
        latency_ms=record.get("latency_ms"),
    )


def _float_layers(result: Result) -> list[FloatLayers]:
    reasons: dict[str, list[dict[str, Any]]] = {}
    for layer in result.float_layers:
        reasons.setdefault(str(layer["reason"]), []).append(layer)
    return [
        FloatLayers(
            reason,
            sum(int(layer["parameters"]) for layer in layers),
            tuple(str(layer["name"] or "(root)") for layer in layers),
        )
        for reason, layers in reasons.items()
    ]


def _stages(result: Result) -> list[Stage]:
    known = [name for name in STAGES if name in result.seconds]
    others = [name for name in result.seconds if name not in STAGES]
    return [
        Stage(
            name,
            STAGES.get(name, name.replace("_", " ")),
            result.seconds[name],
            result.memory.get(name, {}).get("process"),
            result.memory.get(name, {}).get("cuda"),
            "search" if name.startswith("search_") else None,
        )
        for name in (*known, *others)
    ]


def _gaps(result: Result, scored: int) -> list[str]:
    gaps = []
    records = result.history.get("search", [])
    if result.chosen == "given":
        gaps.append("The policy was given, so there was no search, and there are no baselines at its budget.")
    elif not records:
        gaps.append("The search's history was not kept.")
    elif len(records) < scored:
        gaps.append(
            f"Of {scored} policies that the search scored, {len(records)} were kept in the file: every so many, "
            "and each that was the best until then. A report that is written before saving shows all of them."
        )
    if records and records[0].get("weight_bits") is None:
        gaps.append("What the scored policies cost was not kept: an earlier version saved this model.")
    if not result.sensitivities:
        gaps.append("Sensitivities were not kept: an earlier version saved this model.")
    if not result.memory:
        gaps.append("Memory was not recorded: an earlier version saved this model.")
    quantized = [layer for layer in result.layers if result.policy[layer.name].static_input]
    if quantized and all(layer.activation_step is None for layer in quantized):
        gaps.append("Activations' steps were not kept: an earlier version saved this model.")
    if result.accuracy is None:
        gaps.append("There were no labels, so accuracy was not measured: the float model is the reference.")
    return gaps
