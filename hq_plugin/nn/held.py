"""`HeldWeight`: a weight that is a bare parameter of some module, as a layer of its own.

Mixture-of-experts weights are 3-D parameters, attention often keeps its projections as a parameter: there is
no Linear to swap. The parameter moves into a `HeldWeight` below the module, and the module's class gets a
property of the parameter's name that asks the `HeldWeight` for it. Its own code, whatever it does with the
weight, goes on unchanged, and everything that swaps layers can swap this one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import cache
from typing import Any

from torch import Tensor, nn

#: Name of the child that holds the weights of a module: the weight `experts.down_proj` becomes the layer
#: `experts.held.down_proj`.
HOLDER = "held"


class HeldWeight(nn.Module):
    """A parameter as a layer whose forward, without an input, gives the parameter.

    Args:
        parameter: Of two or more dimensions.

    Attributes:
        weight: `[rows, inputs]`, the parameter with all dimensions but the last joined.
        shape: Shape of the parameter.
    """

    weight: Tensor

    def __init__(self, parameter: nn.Parameter) -> None:
        super().__init__()
        self.shape = tuple(parameter.shape)
        weight = parameter.detach().reshape(-1, parameter.shape[-1])
        self.weight = nn.Parameter(weight, requires_grad=parameter.requires_grad)

    def forward(self) -> Tensor:
        """Returns the weight in the parameter's shape."""
        return self.weight.view(self.shape)


def held_name(parameter: str) -> str:
    """Returns the name of the layer that a parameter becomes."""
    module, _, name = parameter.rpartition(".")
    return ".".join(part for part in (module, HOLDER, name) if part)


def with_held_weights(model: nn.Module, layers: Iterable[str], *, inplace: bool = False) -> nn.Module:
    """Returns a copy of a model in which parameters are layers.

    Args:
        model: A model; without anything to hold it is returned itself.
        layers: Names as `held_name` gives them. Those that are layers already, and those of other layers or
            of parameters that the model lacks, are passed over, so that a whole policy may be given.
        inplace: Whether to change `model` itself.
    """
    modules = dict(model.named_modules())
    wanted = []
    for layer in dict.fromkeys(layers):
        path, _, name = layer.rpartition(".")
        owner = path.removesuffix(HOLDER).removesuffix(".")
        if layer in modules or path.rpartition(".")[2] != HOLDER or owner not in modules:
            continue
        if modules[owner]._parameters.get(name) is not None:
            wanted.append((owner, name))
    if not wanted:
        return model
    model = model if inplace else copy.deepcopy(model)
    for owner, name in wanted:
        _hold(model.get_submodule(owner), name)
    return model


def _hold(module: nn.Module, name: str) -> None:
    parameter = module._parameters.pop(name)
    assert parameter is not None
    if HOLDER not in module._modules:
        module._modules[HOLDER] = nn.ModuleDict()
    holder = module._modules[HOLDER]
    assert isinstance(holder, nn.ModuleDict)
    holder[name] = HeldWeight(parameter).train(module.training)
    base, names = _class_of(module), (name,)
    if "_held_names" in vars(base):
        base, names = base.__base__, (*base._held_names, name)
    module.__class__ = _holding_type(base, names)


def _class_of(module: nn.Module) -> Any:
    return type(module)


@cache
def _holding_type(base: Any, names: tuple[str, ...]) -> type[Any]:
    """Returns a subclass of `base`, of the same name, whose weights of these names are held."""

    def asking(name: str) -> property:
        def ask(self: nn.Module) -> Tensor:
            weight: Tensor = self._modules[HOLDER][name]()  # type: ignore[index]
            return weight

        return property(ask, doc="The held weight.")

    def reduced(self: nn.Module, protocol: Any) -> Any:
        # By its name, pickle would find the class without held weights.
        return _empty, (base, names), self.__dict__

    content: dict[str, Any] = {name: asking(name) for name in names}
    content |= {"__module__": base.__module__, "__qualname__": base.__qualname__, "_held_names": names}
    content["__reduce_ex__"] = reduced
    return type(base.__name__, (base,), content)


__all__ = ["HOLDER", "HeldWeight", "held_name", "with_held_weights"]


def _empty(base: Any, names: tuple[str, ...]) -> Any:
    made: Any = _holding_type(base, names)
    return made.__new__(made)
