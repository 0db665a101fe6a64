"""`Readable`: what an exported layer is for code that reads its weight around it.

Attention multiplies by `out_proj.weight` in one operator, language models by that of their embedding.
"""

from __future__ import annotations

from weakref import WeakSet

from torch import Tensor, nn

_RAN: WeakSet[nn.Module] = WeakSet()


class Readable(nn.Module):
    """Base of layers that are exported as operators on integers.

    Attributes:
        float_form: The same layer with a weight that is dequantized in the graph.
    """

    float_form: nn.Module

    @property
    def weight(self) -> Tensor:
        """The float weight; where it is asked for its dtype, device or shape alone, nothing of it is written."""
        weight: Tensor = self.float_form.weight  # type: ignore[assignment]
        return weight

    def note_run(self) -> None:
        """Remembers that the layer itself ran."""
        _RAN.add(self)  # not an attribute: torch.export minds those that change

    def written_form(self) -> nn.Module:
        """Returns the form that was exported: its own, or the float one where others alone read the weight."""
        return self if self in _RAN else self.float_form
