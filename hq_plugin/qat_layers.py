"""The layer in training: a subclass of the float layer that fake-quantizes its own input and weight.

What quantizes is held as modules, whose classes (torch.ao's subclasses) this file does not know.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hq_plugin.distribution import in_pieces
from hq_plugin.nn import with_first


class QATMixin(nn.Module):
    """A layer in training: its weight is generated, and its input is fake-quantized.

    `weight` is a property, so that the float layer's own forward, whatever it does with the weight,
    runs on the generated one; the parameter itself is `_parameters["weight"]`.
    """

    _float_type: type[nn.Module]
    weight_fake_quant: Any
    activation_fake_quant: Any

    @property
    def weight(self) -> Tensor:
        """The fake-quantized weight; the parameter itself where it is in pieces, which FSDP reads by its name."""
        parameter: Any = self._parameters["weight"]
        weight: Tensor = parameter if in_pieces(parameter) else self.weight_fake_quant(parameter)
        return weight

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Runs the float layer's forward on a fake-quantized input and weight."""
        if args and self._float_type.forward is nn.Embedding.forward and not _is_float(args[0]):
            return self._look_up(args[0])
        args, kwargs = with_first(args, kwargs, lambda x: self.activation_fake_quant(x) if _is_float(x) else x)
        output: Tensor = super().forward(*args, **kwargs)
        return output

    def _look_up(self: Any, ids: Tensor) -> Tensor:
        """Does what an embedding does, on the rows that are looked up alone: a vocabulary has many more."""
        if not ids.numel():
            return torch.zeros_like(self._parameters["weight"][:0]).view(*ids.shape, self.embedding_dim)
        found = self.weight_fake_quant.lookup(self._parameters["weight"], ids)
        if found is None or self.max_norm is not None or self.sparse or self.scale_grad_by_freq:
            # Rows that are renormalised are so in place: not those that the gradient is computed from.
            weight = self.weight if self.max_norm is None else self.weight.clone()
            options = self.max_norm, self.norm_type, self.scale_grad_by_freq
            return F.embedding(ids, weight, self.padding_idx, *options)
        rows, places = found
        if self.padding_idx is not None:  # which gets no gradient
            padding = (ids == self.padding_idx).unsqueeze(-1)
            looked_up = F.embedding(places, rows)
            return torch.where(padding, looked_up.detach(), looked_up)
        return F.embedding(places, rows)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@cache
def qat_type(float_type: Any) -> type[nn.Module]:
    """Returns the subclass of a float layer's type that fake-quantizes; one for each type."""
    name = f"QAT{float_type.__name__}"
    return type(name, (QATMixin, float_type), {"_float_type": float_type, "__module__": __name__})


def qat_layers(prepared: nn.Module) -> dict[str, nn.Module]:
    """Returns the layers of a prepared model that fake-quantize, by name."""
    return {name: module for name, module in prepared.named_modules() if isinstance(module, QATMixin)}


def set_trainable(prepared: nn.Module, float_too: bool) -> None:
    """Chooses what of a prepared model trains.

    Args:
        prepared: The model.
        float_too: Whether its float layers and biases do, beside the quantized weights and their steps.
    """
    for parameter in prepared.parameters():
        parameter.requires_grad_(float_too and (parameter.is_floating_point() or parameter.is_complex()))
    for layer in qat_layers(prepared).values():
        for module in (layer.weight_fake_quant, layer.activation_fake_quant):
            assert isinstance(module, nn.Module)
            module.requires_grad_(True)
        weight = layer._parameters["weight"]
        assert weight is not None
        weight.requires_grad_(True)
