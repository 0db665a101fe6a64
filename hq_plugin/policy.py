"""The hybrid quantization vector: a bit width for every layer, and its JSON form.

Only widths live here. What a width costs is `cost.py`; which widths are allowed is `space.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hq_plugin.errors import PolicyError

#: Activation width that means "stays in floating point". BitOps count it as 16 bits.
FLOAT_BITS = 16
WEIGHT_BITS = range(1, 9)
#: Width of a weight that is left out: every value is 0, and nothing is stored. Blocks of an embedding's columns may
#: choose it.
LEFT_OUT = 0
ACTIVATION_BITS = (*range(2, 9), FLOAT_BITS)


@dataclass(frozen=True, order=True)
class LayerBits:
    """The bit widths of one layer.

    Attributes:
        weight: Bits of each weight, 1 to 8, or 0 for a block of an embedding's columns that is left out.
        activation: Bits of each element of the layer's input, 2 to 8, or 16 for floating point.
        group_size: Inputs of a channel that share one step and one zero point; 0 gives each channel one
            step and no zero point.
        dynamic: Whether step and zero point of the input are computed when the layer runs, one for each row of
            its last dimension (a token), and not calibrated, one a tensor.
    """

    weight: int
    activation: int = FLOAT_BITS
    group_size: int = 0
    dynamic: bool = False

    def __post_init__(self) -> None:
        possible = self.weight == LEFT_OUT or self.weight in WEIGHT_BITS
        if not possible or not isinstance(self.weight, int) or isinstance(self.weight, bool):
            raise PolicyError(f"Weight width {self.weight!r} is not possible: weights take 1 to 8 bits.")
        if self.activation not in ACTIVATION_BITS or not isinstance(self.activation, int):
            raise PolicyError(
                f"Activation width {self.activation!r} is not possible: activations take 2 to 8 bits, "
                f"or {FLOAT_BITS} to stay in floating point."
            )
        if not isinstance(self.group_size, int) or isinstance(self.group_size, bool) or self.group_size < 0:
            raise PolicyError(f"Group size {self.group_size!r} is not possible: 0 or a number of inputs.")
        if self.weight == LEFT_OUT and self.group_size:
            raise PolicyError("A weight of 0 bits is left out: it has no groups.")
        if self.dynamic and self.activation == FLOAT_BITS:
            raise PolicyError("A dynamic activation needs 2 to 8 bits; one in floating point has no steps.")

    @property
    def static_input(self) -> bool:
        """Whether the layer keeps a step and a zero point for its input."""
        return self.activation != FLOAT_BITS and not self.dynamic

    def __str__(self) -> str:
        group = f"g{self.group_size}" if self.group_size else ""
        inputs = "" if self.activation == FLOAT_BITS else f"A{self.activation}{'d' if self.dynamic else ''}"
        return f"W{self.weight}{group}{inputs}"

    def to_json(self) -> list[int]:
        """Returns `[weight bits, activation bits(, group size(, 1 for a dynamic input))]`."""
        if self.dynamic:
            return [self.weight, self.activation, self.group_size, 1]
        return [self.weight, self.activation, *([self.group_size] if self.group_size else [])]


class HybridPolicy(Mapping[str, LayerBits]):
    """An immutable hybrid quantization vector: site name to `LayerBits`, in the model's order.

    Section 3.1 of arXiv:2004.11506 calls this the hybrid quantization vector.

    Args:
        bits: Site name to widths.
    """

    def __init__(self, bits: Mapping[str, LayerBits]) -> None:
        self._bits = dict(bits)

    def __getitem__(self, name: str) -> LayerBits:
        return self._bits[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._bits)

    def __len__(self) -> int:
        return len(self._bits)

    def __hash__(self) -> int:
        return hash(frozenset(self._bits.items()))  # equal whatever the order

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HybridPolicy) and self._bits == other._bits

    def __repr__(self) -> str:
        return f"HybridPolicy({{{', '.join(f'{name!r}: {bits}' for name, bits in self._bits.items())}}})"

    def to_json(self) -> dict[str, list[int]]:
        """Returns `{site: [weight bits, activation bits(, group size(, dynamic))]}`, as `from_json` reads it."""
        return {name: bits.to_json() for name, bits in self._bits.items()}

    @classmethod
    def from_json(cls, text: str | Mapping[str, Any]) -> HybridPolicy:
        """Reads a policy from JSON.

        Args:
            text: A JSON string, or what it decodes to.

        Raises:
            PolicyError: The JSON is not an object of `[weight bits, activation bits(, group size(, dynamic))]`.
        """
        try:
            data = json.loads(text) if isinstance(text, str) else text
            return cls({str(name): _layer_bits(*map(_whole, pair)) for name, pair in data.items()})
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, PolicyError):
                raise
            raise PolicyError(
                'A policy is a JSON object such as {"layer1.conv": [4, 8]}: site name to '
                f"[weight bits, activation bits]. This one is not: {error}"
            ) from error


def _layer_bits(weight: int, activation: int = FLOAT_BITS, group_size: int = 0, dynamic: int = 0) -> LayerBits:
    if dynamic not in (0, 1):
        raise PolicyError(f"dynamic={dynamic!r} is not possible: 1 where the input is quantized, or 0.")
    return LayerBits(weight, activation, group_size, bool(dynamic))


def _whole(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise PolicyError(f"A bit width is a whole number, not {value!r}.")
    return value
