"""The data of a report: everything that its page, its figures and its JSON show.

`Document.to_json` is the format of `report.json`: the fields below by their names, `None` for what is not known,
sizes in bytes, times in seconds or as the name says, distances as `distance_name` says, widths in bits, where an
activation width of 16 means float. `gaps` says in words what is missing and why. How they come from a `Result` is
`gather.py`, how they are drawn `page.py` and `figures.py`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from hq_plugin.budget import format_bytes, format_count

FORMAT, VERSION = "hq_plugin report", 1

#: Costs over which a front can be drawn: the field of `Costs`, and what it is called on an axis.
AXES = {
    "weight_bits": "effective bits a weight",
    "size": "bytes of the model",
    "bitops": "BitOps of a sample",
    "energy_uj": "energy of a sample, µJ",
    "latency_ms": "latency of a forward, ms",
}


@dataclass(frozen=True)
class Limit:
    """One limit of the budget: its field in `hq_plugin.Budget`, what of it is spent, and the share of it."""

    name: str
    label: str
    limit: float
    spent: float
    share: float


@dataclass(frozen=True)
class Candidate:
    """A model at this budget: `"float"`, a baseline or search before fine-tuning, or the finished `"result"`."""

    name: str
    label: str
    distance: float | None
    accuracy: float | None
    metric: float | None
    weight_bits: float | None
    size: int
    bitops: float | None
    energy_uj: float | None
    latency_ms: float | None
    chosen: bool


@dataclass(frozen=True)
class Layer:
    """One quantized layer. `activation_low` to `activation_high` is what its quantized input can hold."""

    name: str
    kind: str
    shape: tuple[int, ...]
    weights: int
    weight_bits: int
    activation_bits: int
    dynamic: bool
    group_size: int
    size: int
    bitops: float
    shares_with: tuple[str, ...]
    sensitivity: float | None
    sensitivities: dict[int, float]
    activation_step: float | None
    activation_zero_point: int | None
    activation_low: float | None
    activation_high: float | None


@dataclass(frozen=True)
class Policy:
    """A point of the search: when it was scored, how far it was from the float model, and what it costs."""

    evaluation: int
    score: float | None
    weight_bits: float | None
    size: int | None
    bitops: float | None
    energy_uj: float | None
    latency_ms: float | None


@dataclass(frozen=True)
class FrontPoint:
    """What additive sensitivities predict to be best at a cost, before any training."""

    predicted: float
    weight_bits: float
    size: int
    bitops: float
    energy_uj: float
    latency_ms: float | None


@dataclass(frozen=True)
class Stage:
    """A stage of the work: its wall time, and the most memory in use since the process began until its end."""

    name: str
    label: str
    seconds: float
    memory: int | None
    cuda_memory: int | None
    part_of: str | None


@dataclass(frozen=True)
class FloatLayers:
    """Layers that stay float for one reason, and their parameters together."""

    reason: str
    parameters: int
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Document:
    """A report.

    Attributes:
        model: Name of the float model.
        budget: The budget as it was given.
        chosen: The candidate whose policy the result has.
        chosen_label: That for people.
        distance_name: What `distance`, `score` and sensitivities are.
        agreement: Share of held-out samples on which the result and the float model choose the same class.
        float_size: Bytes of the float model.
        limits: What of the budget was used.
        candidates: Float, baselines, search and result.
        layers: The quantized layers in the model's order.
        front_axis: The field of costs over which `front` is optimal.
        front: Predicted by additive sensitivities.
        policies: What the search scored, as far as it was kept.
        policies_scored: How many it scored.
        training: `"meta_training"` and `"finetune"`: the steps and losses that were kept.
        float_layers: What stayed float and why.
        stages: Time and memory.
        versions: Of the libraries.
        seed: Of everything random.
        config: The options.
        gaps: What this report cannot show, and why.
    """

    model: str
    budget: str
    chosen: str
    chosen_label: str
    distance_name: str
    agreement: float | None
    float_size: int
    limits: tuple[Limit, ...]
    candidates: tuple[Candidate, ...]
    layers: tuple[Layer, ...]
    front_axis: str
    front: tuple[FrontPoint, ...]
    policies: tuple[Policy, ...]
    policies_scored: int
    training: dict[str, tuple[tuple[int, float], ...]]
    float_layers: tuple[FloatLayers, ...]
    stages: tuple[Stage, ...]
    versions: dict[str, str]
    seed: int | None
    config: dict[str, Any]
    gaps: tuple[str, ...]

    @property
    def result(self) -> Candidate:
        """The finished model."""
        return self.candidates[-1]

    def to_json(self) -> dict[str, Any]:
        """Returns the document as JSON values, in which no number is infinite."""
        plain: dict[str, Any] = finite({"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)})
        return plain


def format_cost(axis: str, value: float | None) -> str:
    """Writes a cost for people, with its unit; an empty text where it is not known."""
    if value is None:
        return ""
    if axis == "weight_bits":
        return f"{value:.3f} bits"
    if axis in ("size", "size_fraction"):
        return format_bytes(value)
    if axis == "bitops":
        return f"{format_count(value)}BitOps"
    return f"{value:.4g} {'µJ' if axis == 'energy_uj' else 'ms'}"


def finite(value: Any) -> Any:
    """Returns JSON values with None in place of numbers that are not finite, for which JSON has no word."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(name): finite(part) for name, part in value.items()}
    return [finite(part) for part in value] if isinstance(value, (list, tuple)) else value
