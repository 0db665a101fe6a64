"""What the result may cost: `Budget` and the parser of its short forms.

A budget knows limits, not models: what a policy costs is counted in `cost.py`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

from hq_plugin.errors import BudgetError

_BYTES = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_PREFIX = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_SECONDS = {"us": 1e-3, "ms": 1.0, "s": 1e3}
_JOULES = {"nj": 1e-3, "uj": 1.0, "mj": 1e3}
_FORMS = (
    '"3bit" (effective bits a weight), "250KB", "4MB", "12%" (of the float size), "1.5GBitOps", "8ms", '
    '"8ms for 4 samples" (one forward of them), "50uJ"'
)

#: What people call each limit.
LIMITS = {
    "weight_bits": "effective bits",
    "size": "size",
    "size_fraction": "size",
    "bitops": "BitOps",
    "energy_uj": "energy",
    "latency_ms": "latency",
}


@dataclass(frozen=True)
class Budget:
    """Limits that a policy must keep, all at once. Every field is optional, one is needed.

    Attributes:
        weight_bits: Mean effective bits over the weights of all quantizable sites, their scales
            and zero points counted.
        size: Bytes of all tensors of the model, what stays float counted; headers and the report come on top.
        size_fraction: The same as a fraction of the float model's bytes, in (0, 1].
        bitops: Multiply-accumulates × weight bits × activation bits, of one sample, summed over sites.
        latency_ms: Milliseconds of one forward of `batch` samples on this machine, or on the one that the
            option `profile` is of.
        energy_uj: Microjoules of one sample, by `hq_plugin.cost.ENERGY`.
        batch: Samples of the forward that `latency_ms` limits.
    """

    weight_bits: float | None = None
    size: float | None = None
    size_fraction: float | None = None
    bitops: float | None = None
    latency_ms: float | None = None
    energy_uj: float | None = None
    batch: int = 1

    def __post_init__(self) -> None:
        limits = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "batch"}
        if not isinstance(self.batch, int) or isinstance(self.batch, bool) or self.batch < 1:
            raise BudgetError(f"Budget batch={self.batch!r} must be a whole number of at least 1.")
        if all(value is None for value in limits.values()):
            raise BudgetError(f"A Budget needs at least one limit of {', '.join(limits)}.")
        for name, value in limits.items():
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
                raise BudgetError(f"Budget {name}={value!r} is not a finite number.")
            if value <= 0:
                raise BudgetError(f"Budget {name}={value!r} is not positive. Ask for more than nothing.")
        if self.size_fraction is not None and self.size_fraction > 1:
            raise BudgetError(f"Budget {self.size_fraction:.0%} is above 100 % of the float model.")

    @classmethod
    def parse(cls, budget: str | Budget) -> Budget:
        """Reads the short forms: `"3bit"`, `"250KB"`, `"4MB"`, `"12%"`, `"1.5GBitOps"`, `"8ms"`, `"50uJ"`.

        A time may be that of several samples: `"8ms for 4 samples"`. Several limits may be joined by `+` or a
        comma: `"3bit + 2GBitOps"`. KB, MB and GB are powers of 1000, KiB, MiB and GiB of 1024. Case and spaces do
        not matter.

        Args:
            budget: The text; a `Budget` is returned as it is.

        Raises:
            BudgetError: The text has none of these forms, or a limit is not positive.
        """
        if isinstance(budget, Budget):
            return budget
        if not isinstance(budget, str):
            raise BudgetError(f"A budget is a string or a Budget, not {type(budget).__name__}. Try {_FORMS}.")
        limits: dict[str, Any] = {}
        for part in re.split(r"(?<!\d[eE])\+|,", budget):
            timed = re.fullmatch(r"(.*s)\s*for\s*(\d+)\s*samples?\s*", part.lower())
            name, value = cls._parse_limit(timed[1] if timed else part, budget)
            if name in limits:
                raise BudgetError(f"Budget {budget!r} gives {name} twice.")
            limits[name] = value
            if timed:
                if name != "latency_ms":
                    raise BudgetError(f'Budget {budget!r}: only a time has samples, "8ms for 4 samples".')
                limits["batch"] = int(timed[2])
        return cls(**limits)

    @staticmethod
    def _parse_limit(part: str, whole: str) -> tuple[str, float]:
        # Reports write microjoules with the micro sign, which many keyboards give as the Greek letter.
        written = re.sub("[\N{MICRO SIGN}\N{GREEK SMALL LETTER MU}]", "u", part.lower())
        match = re.fullmatch(r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)\s*([a-z%]+)\s*", written)
        if match:
            value, unit = float(match[1]), match[2]
            if unit in ("bit", "bits"):
                return "weight_bits", value
            if unit == "%":
                return "size_fraction", value / 100
            if unit in _BYTES:
                return "size", value * _BYTES[unit]
            if unit in _SECONDS:
                return "latency_ms", value * _SECONDS[unit]
            if unit in _JOULES:
                return "energy_uj", value * _JOULES[unit]
            bitops = re.fullmatch(r"([kmgt]?)bitops?", unit)
            if bitops:
                return "bitops", value * _PREFIX[bitops[1]]
        raise BudgetError(f"Budget {whole!r} cannot be read. Possible are {_FORMS}, or a Budget(...).")

    def __str__(self) -> str:
        parts = []
        if self.weight_bits is not None:
            parts.append(f"{self.weight_bits:g}bit")
        if self.size is not None:
            parts.append(f"{_exact(self.size)}B")
        if self.size_fraction is not None:
            parts.append(f"{self.size_fraction * 100:g}%")
        if self.bitops is not None:
            parts.append(f"{_exact(self.bitops)}BitOps")
        if self.latency_ms is not None:
            parts.append(f"{self.latency_ms:g}ms" + (f" for {self.batch} samples" if self.batch > 1 else ""))
        if self.energy_uj is not None:
            parts.append(f"{self.energy_uj:g}uJ")
        return " + ".join(parts)


def _exact(count: float) -> str:
    """Writes a count with an SI prefix and all of its digits: a limit that is read again is the same."""
    prefix = next((name for name in "TGMk" if count >= _PREFIX[name.lower()]), "")
    return f"{count / _PREFIX[prefix.lower()]:.15g} {prefix}"


def format_bytes(count: float) -> str:
    """Writes a number of bytes for people, in powers of 1000: `1.23 MB`."""
    return f"{format_count(count)}B"


def format_count(count: float, digits: int = 3) -> str:
    """Writes a count with an SI prefix: `1.23 M`."""
    for prefix in ("", "k", "M", "G"):
        if abs(count) < 999.5:
            return f"{count:.{digits}g} {prefix}" if prefix or count % 1 else f"{count:.0f} "
        count /= 1000
    return f"{count:.4g} T"
