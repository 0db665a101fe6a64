"""`Result`: what `model.hq` holds, everything a user may ask about a quantized model, as plain data."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hq_plugin.policy import HybridPolicy
from hq_plugin.untrusted import check_types, clean_errors

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Costs:
    """What a policy costs.

    Attributes:
        weight_bits: Mean effective bits a weight over all sites, steps and zero points counted.
        size: Bytes of all tensors of the model, what stays float counted; headers and the report come on top.
        bitops: Multiply-accumulates × weight bits × activation bits of one sample.
        energy_uj: Microjoules of one sample, by `hq_plugin.cost.ENERGY`.
        latency_ms: Milliseconds of one forward, where the budget limits it: by the profile, or as measured for
            what a search on this machine chose.
    """

    weight_bits: float
    size: int
    bitops: float
    energy_uj: float = 0.0
    latency_ms: float | None = None


@dataclass(frozen=True)
class Baseline:
    """A policy at the same budget and how it did.

    Attributes:
        name: `"uniform"`, `"dynamic_programming"` or `"searched"`.
        policy: Its widths.
        costs: What it costs.
        kl: Its distance to the float model on held-out data, before fine-tuning: KL divergence in nats
            a sample, or relative squared error where the outputs are not class scores.
        accuracy: Top-1 accuracy on the held-out data, 0 to 1, where there are labels.
        metric: What `eval_fn` returned, where one was given.
    """

    name: str
    policy: HybridPolicy
    costs: Costs
    kl: float
    accuracy: float | None = None
    metric: float | None = None


@dataclass(frozen=True)
class LayerReport:
    """One site of the result: its widths, shape, bytes and BitOps.

    Where its input is quantized, it is `(integer - activation_zero_point) * activation_step`, the integers being
    0 to `2 ** activation_bits - 1`.

    Attributes:
        name: Its name in the model.
        kind: `"linear"`, `"conv1d"`, `"conv2d"`, `"embedding"`, or `"held"` for a parameter of a module.
        shape: Of the weight.
        weight_bits: Bits of each weight.
        activation_bits: Bits of each element of the input; 16 is float.
        size: Bytes of the packed weight, steps and zero points counted.
        bitops: Multiply-accumulates × weight bits × activation bits of one sample.
        activation_step: Step of the input; None where it is float, or has a step for each row.
        activation_zero_point: Zero point of the input, or None.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    weight_bits: int
    activation_bits: int
    size: int
    bitops: float
    activation_step: float | None = None
    activation_zero_point: int | None = None


@dataclass(frozen=True)
class Sensitivity:
    """What each width of a group of sites costs alone, every other one at its widest.

    Attributes:
        sites: The sites, which share their widths.
        weight_bits: Widths for the weights, ascending.
        weight: Rise of the distance to the float model at each of them.
        activation_bits: Widths for the inputs.
        activation: Rise of the distance at each of them.
    """

    sites: tuple[str, ...]
    weight_bits: tuple[int, ...]
    weight: tuple[float, ...]
    activation_bits: tuple[int, ...]
    activation: tuple[float, ...]

    def rise(self, weight_bits: int, activation_bits: int) -> float | None:
        """Returns the rise of two widths together, or None where they are not among those measured."""
        weights = dict(zip(self.weight_bits, self.weight, strict=True))
        activations = dict(zip(self.activation_bits, self.activation, strict=True))
        if weight_bits not in weights or activation_bits not in activations:
            return None
        return weights[weight_bits] + activations[activation_bits]


@dataclass
class Result:
    """What was decided for a model, why, and what it gave.

    Attributes:
        policy: The hybrid quantization vector of the model.
        budget: The budget as text.
        chosen: Which of the baselines the policy is: `"searched"` unless one of the others was better (what
            training repairs less of counts more).
        costs: What the model costs.
        used: Share of each limit that is used, by limit name; never above 1, but for a latency that no policy
            kept, which was warned of.
        float_size: Bytes of the float model.
        float_accuracy: Top-1 accuracy of the float model on the held-out data, where there are labels.
        float_metric: What `eval_fn` returned for the float model, where one was given.
        kl: Distance of the finished model to the float model on held-out data.
        agreement: Share of held-out samples on which both models choose the same class.
        accuracy: Top-1 accuracy of the finished model on held-out data, where there are labels.
        metric: What `eval_fn` returned for the finished model, where one was given.
        baselines: Uniform, dynamic-programming and searched policy at the same budget.
        layers: Every site.
        float_layers: Layers that stay float: name, type, parameters and reason.
        history: `"meta_training"` and `"finetune"`: one `{"step", "loss", "batch_statistics"}` a record, the first
            of fine-tuning with `"rates"`, the share of the rates of weights that was taken where nobody gave one,
            `"start"` and `"rounding"`, what it began from; `"search"`: one `{"evaluation", "policy", "score"}` and
            the fields of `Costs` for every policy scored.
        seconds: Wall time of each stage.
        memory: Most bytes in use so far at the end of each stage (`hq_plugin.memory.peak_memory`).
        config: The options.
        versions: Versions of hq_plugin, torch and Python.
        model: Name of the float model: its library's, or its class.
        distance: What the distances are: `"KL divergence"`, `"relative squared error"`, or the name of a loss.
        sensitivities: What each width costs alone, from which the search started.
        front: Policies that additive sensitivities predict to be best over the budget's first limit: each the
            fields of `Costs`, and `"predicted"`, the sum of its sensitivities.
    """

    policy: HybridPolicy
    budget: str
    chosen: str
    costs: Costs
    used: dict[str, float]
    float_size: int
    kl: float
    baselines: dict[str, Baseline]
    layers: list[LayerReport]
    float_layers: list[dict[str, Any]]
    agreement: float | None = None
    accuracy: float | None = None
    metric: float | None = None
    float_accuracy: float | None = None
    float_metric: float | None = None
    history: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    model: str = ""
    distance: str = ""
    sensitivities: list[Sensitivity] = field(default_factory=list)
    front: list[dict[str, Any]] = field(default_factory=list)

    @property
    def effective_bits(self) -> float:
        """Mean effective bits a weight, steps and zero points counted."""
        return self.costs.weight_bits

    @property
    def size(self) -> int:
        """Bytes of all tensors of the model; what a file adds, its header and the report, is not counted."""
        return self.costs.size

    @property
    def bitops(self) -> float:
        """BitOps of one sample."""
        return self.costs.bitops

    def __str__(self) -> str:
        """Writes a line for people; `repr` holds everything, histories too."""
        return (
            f"{self.effective_bits:.3f} effective bits, {self.size:,} of {self.float_size:,} bytes, "
            f"{self.distance or 'distance'} {self.kl:.4f} to the float model; {self.budget}, {self.chosen}"
        )

    def report(self, path: str | Path) -> Path:
        """Writes the report: what was decided, why, and what it gave.

        Args:
            path: `"report.html"`, one page that needs nothing else; `"report.json"`, the data of that page; or
                `"report.png"`, `.svg` or `.pdf`, its figures by matplotlib. The file appears whole or not at all.

        Returns:
            The file.

        Raises:
            ConfigError: The name ends in none of these, or matplotlib is missing.
            ArtifactPathError: The file cannot be written.
        """
        from hq_plugin.report import write_report

        return write_report(self, path)

    def plot(self, what: str = "overview") -> Figure:
        """Draws the report with matplotlib, for papers and notebooks.

        Args:
            what: `"widths"`, `"sensitivities"`, `"front"`, `"training"`, `"search"`, or `"overview"`: all of them.

        Returns:
            The figure, which is not shown: `figure.savefig("front.pdf")`.

        Raises:
            ConfigError: matplotlib is not installed, or there is no such figure.
        """
        from hq_plugin.report.figures import draw

        return draw(self, what)

    def _repr_html_(self) -> str:
        """Returns a summary for Jupyter."""
        from hq_plugin.report import summary

        return summary(self)

    def to_json(self) -> dict[str, Any]:
        """Returns the result as JSON values, which `from_json` reads back."""
        data = {name: getattr(self, name) for name in self.__dataclass_fields__}
        data["history"] = dict(self.history)
        data["policy"] = self.policy.to_json()
        data["costs"] = asdict(self.costs)
        data["layers"] = [asdict(layer) for layer in self.layers]
        data["sensitivities"] = [asdict(group) for group in self.sensitivities]
        data["baselines"] = {
            name: {**vars(b), "policy": b.policy.to_json(), "costs": asdict(b.costs)}
            for name, b in self.baselines.items()
        }
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Result:
        """Reads what `to_json` wrote, also by an earlier version: fields that it lacked keep their defaults.

        Raises:
            ArtifactError: A field is missing or has the wrong form.
        """
        with clean_errors("The saved report"):
            required = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
            values = {f.name: data[f.name] for f in fields(cls) if f.name in data or f.name in required}
            values["policy"] = HybridPolicy.from_json(data["policy"])
            values["costs"] = Costs(**data["costs"])
            values["layers"] = [
                LayerReport(**{**layer, "shape": tuple(layer["shape"])}) for layer in data["layers"]
            ]
            values["baselines"] = {
                name: Baseline(**{**b, "policy": HybridPolicy.from_json(b["policy"]), "costs": Costs(**b["costs"])})
                for name, b in data["baselines"].items()
            }
            values["sensitivities"] = [
                Sensitivity(**{name: tuple(value) for name, value in group.items()})
                for group in data.get("sensitivities", [])
            ]
            result = cls(**values)
            check_types(result)
            return result


def versions() -> dict[str, str]:
    """Returns the versions that a result depends on."""
    return {
        "hq_plugin": metadata.version("hq-plugin"),
        "torch": metadata.version("torch"),
        "python": platform.python_version(),
    }
