"""How long each layer takes at each width on a machine: latency as a cost like any other.

Nothing is measured here (`profiling.py` does that): a `Profile` is read, written, checked and turned into costs.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from hq_plugin.cost import CostTable, Table
from hq_plugin.errors import ArtifactError, ArtifactPathError, ConfigError, HQWarning
from hq_plugin.policy import HybridPolicy, LayerBits
from hq_plugin.result import versions
from hq_plugin.sites import Site
from hq_plugin.space import SearchSpace
from hq_plugin.storage import read_sealed, sealed, write_text
from hq_plugin.timing import machine
from hq_plugin.untrusted import check_types, clean_errors

FORMAT, VERSION = "hq_plugin profile", 2
#: Share of the model's time by which promises may be wrong without a warning.
TRUSTED = 0.15


@dataclass(frozen=True)
class Profile:
    """Times of the layers of a model on a machine.

    Attributes:
        target: `"torch"` or `"onnxruntime"`.
        batch: Samples of a forward.
        machine: Processor, threads and version of torch.
        date: When it was measured, ISO 8601.
        versions: Versions of the libraries.
        rest: Milliseconds of the model that no width changes.
        slopes: Milliseconds of the model for each millisecond of its layers alone, by the width of their inputs: a
            runtime keeps integers between layers that have them, and what is timed alone starts and ends in floats.
        error: By how much, as a share, the model under one of the policies that it was timed under took more or
            less time than its layers' times, `slopes` and `rest` say.
        layers: Milliseconds of each distinct layer (`signature`) at each `"weight,activation"` width, by kernel;
            the fastest counts.
    """

    target: str
    batch: int
    machine: str
    date: str
    versions: dict[str, str]
    rest: float
    slopes: dict[str, float]
    error: float
    layers: dict[str, dict[str, dict[str, float]]]

    def table(self, space: SearchSpace) -> Table:
        """Returns milliseconds, `[groups, weight widths, activation widths]`.

        A narrower width may take longer: an input that is quantized first, integers that are unpacked.

        Raises:
            ConfigError: The profile lacks a layer or a width of the space.
        """
        shape = (len(space.groups), *(int(size) + 1 for size in space.top.max(axis=0)))
        times = np.full(shape, np.inf)
        for g, group in enumerate(space.groups):
            for w in range(len(group.weight_bits)):
                for a in range(len(group.activation_bits)):
                    choices = [(site, group.bits(site, w, a)) for site in group.sites]
                    slopes = [self._slope(str(bits.activation)) for _, bits in choices]
                    alone = [self._time(site, bits) for site, bits in choices]
                    times[g, w, a] = float(np.dot(slopes, alone))
        return times

    def sums(self, space: SearchSpace, policy: HybridPolicy) -> dict[str, float]:
        """Returns the milliseconds of all layers alone under a policy, by the width of their inputs.

        Raises:
            ConfigError: The profile lacks a layer or a width of the policy.
        """
        found: dict[str, float] = {}
        for site in space.table:
            bits = policy[site.name]
            found[str(bits.activation)] = found.get(str(bits.activation), 0.0) + self._time(site, bits)
        return found

    def milliseconds(self, sums: Mapping[str, float]) -> float:
        """Returns what the model takes where its layers take this alone."""
        return self.rest + sum(self._slope(inputs) * total for inputs, total in sums.items())

    def _slope(self, inputs: str) -> float:
        """Returns the slope of layers whose inputs have a width; 1 before slopes are fitted."""
        return self.slopes.get(inputs, 1.0)

    def put_into(self, costs: CostTable) -> None:
        """Gives a cost table the latency of its choices.

        Raises:
            ConfigError: The profile lacks a layer or a width of its space.
        """
        costs.latency, costs.latency_rest = self.table(costs.space), self.rest
        costs.latency_batch = self.batch

    def _time(self, site: Site, bits: LayerBits) -> float:
        try:
            return min(self.layers[signature(site)][width(bits)].values())
        except KeyError:
            how = "hq-plugin profile, with the same target, weight_bits and activation_bits."
            if signature(site) not in self.layers and any(name.startswith(_layer(site)) for name in self.layers):
                raise ConfigError(
                    f"The profile has no time for {site.name!r} on inputs of {site.input_numel:,} numbers a "
                    "sample: it was measured on inputs of another size. Give data of that size, or measure one for "
                    f"this: {how}"
                ) from None
            raise ConfigError(
                f"The profile has no time for {site.name!r} at {bits}. Measure one for this model and these "
                f"widths: {how}"
            ) from None

    def save(self, path: str | Path) -> Path:
        """Writes the profile as JSON; the file appears whole or not at all.

        Args:
            path: The file; an old one is replaced.

        Returns:
            The file.

        Raises:
            ArtifactPathError: It cannot be written there.
        """
        target = Path(path).expanduser()
        content = sealed({"format": FORMAT, "version": VERSION, **asdict(self)})
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            write_text(target, json.dumps(content, indent=1))
        except OSError as error:
            raise ArtifactPathError(f"The profile cannot be written to {target}: {error}") from error
        return target

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Reads what `save` wrote.

        Args:
            path: The file.

        Raises:
            ArtifactError: The file is missing, damaged, or of a newer version.
        """
        source = Path(path).expanduser()
        try:
            data = read_sealed(source, FORMAT, VERSION)
        except FileNotFoundError as error:
            raise ArtifactError(f"{source} cannot be read: {error}") from error
        with clean_errors(source):
            made = cls(**{name: data[name] for name in cls.__dataclass_fields__})
            check_types(made)
            kernels = [ms for widths in made.layers.values() for ms in widths.values()]
            if not all(kernels):
                raise ValueError("a layer has no time")
            numbers = [
                made.rest,
                made.error,
                *made.slopes.values(),
                *(ms for times in kernels for ms in times.values()),
            ]
            if not all(0 <= number < np.inf for number in numbers):
                raise ValueError("a time is not a positive number")
        return made

    def check_target(self, target: str) -> None:
        """Raises ConfigError where the profile is of another runtime than a target's."""
        if self.target != runtime(target):
            raise ConfigError(
                f"The profile is of target={self.target!r}, and target={target!r} runs on other kernels. "
                f"Measure one for that: hq-plugin profile --target {runtime(target)}; or give "
                f"target={self.target!r}."
            )

    def warn_if_foreign(self, device: torch.device) -> None:
        """Warns where the profile is of another machine or of other versions than these.

        Args:
            device: Where the model is, and would be timed.
        """
        here = where(self.target, device)
        different = [f"machine ({self.machine}; this is {here})"] if self.machine != here else []
        now = engine_versions(self.target)
        different += [
            f"{name} {then} (now {now.get(name)})" for name, then in self.versions.items() if now.get(name) != then
        ]
        if different:
            warnings.warn(
                f"The profile of {self.date} is of another {', '.join(different)}. Times may differ; measure here "
                "with hq-plugin profile, or ignore this if the model is for that machine.",
                HQWarning,
                stacklevel=3,
            )

    def warn_if_rough(self) -> None:
        """Warns where the times of layers do not add up to those of the model."""
        if self.error > TRUSTED:
            warnings.warn(
                f"Times of layers do not add up to the model's: one policy took {self.error:.0%} more or less. "
                "Layers with quantized and with float inputs side by side may cost conversions that no layer has "
                "alone: give one width of activations (activation_bits=8). If the machine was busy, measure again.",
                HQWarning,
                stacklevel=3,
            )


def runtime(target: str) -> str:
    """Returns what a target runs on, as profiles name it: a model for storage runs in PyTorch."""
    return "onnxruntime" if target == "onnxruntime" else "torch"


def where(target: str, device: torch.device) -> str:
    """Returns the machine on which a model on a device is timed: ONNX Runtime's is the processor."""
    return machine(device if runtime(target) == "torch" else None)


def engine_versions(target: str) -> dict[str, str]:
    """Returns the versions of what a model runs on."""
    if target != "onnxruntime":
        return versions()
    try:
        return {**versions(), "onnxruntime": metadata.version("onnxruntime")}
    except metadata.PackageNotFoundError:  # a profile may be used where the engine is not
        return versions()


def signature(site: Site) -> str:
    """Returns what tells layers of different speed apart."""
    return f"{_layer(site)}macs={site.macs} inputs={site.input_numel}"


def _layer(site: Site) -> str:
    """Returns how the signatures of a layer begin, whatever the size of its inputs."""
    return f"{site.type_name} {list(site.weight_shape)} "


def width(bits: LayerBits) -> str:
    """Returns the key of a layer's widths."""
    return ",".join(map(str, bits.to_json()))
