"""Good integers for a network to start training from: each layer makes up for what those before it got wrong.

Layers are rounded (`rounding.py`) in the order in which they run, on the inputs that those before them, rounded
already, give, towards what the float network's layer gives on its own inputs; BatchNorms that come in between take
over the statistics of what reaches them. Embeddings are first: rows are rounded by what the network minds
(`outer_products.py`).
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hq_plugin.batch import Batch
from hq_plugin.batchnorm import has_statistics
from hq_plugin.distillation import LossFunction
from hq_plugin.lockstep import in_lockstep
from hq_plugin.modes import in_eval_mode
from hq_plugin.nn.split import same_columns
from hq_plugin.outer_products import MULTIPLYING, gradient_products, input_products, multiplied
from hq_plugin.precision import autocast
from hq_plugin.qat_layers import qat_layers
from hq_plugin.recalibration import Statistics, statistics_of
from hq_plugin.rounding import round_layer

#: What is added to the diagonal of outer products, as a share of its mean: `_DAMPING`, with which half of what they
#: say counts, and less where there are more vectors than `_VECTORS` for each input. Few are fitted too well.
_DAMPING, _VECTORS = 1.0, 16
#: Vectors of a sample that count there, at most: places of a picture are alike, and so are tokens of a text. 64
#: pictures with thousands of places each do not say more than 64 pictures do (docs/experiments.md).
_OF_A_SAMPLE = 32
#: Which of the two networks a forward is of.
_FLOAT, _ROUNDED = "float", "rounded"
#: What each forward calls a module with, by network and batch.
_Inputs = dict[tuple[str, int], Any]


def start_from_good_integers(
    network: nn.Module, teacher: nn.Module, batches: Iterable[Batch], loss: LossFunction | None = None
) -> bool:
    """Moves the weights of a network with a fixed policy onto integers found to second order.

    Layers that run several times a forward, or share a weight, are rounded once, by all that they multiply in the
    float network. A layer and an embedding that share one want different integers, and are left as they are.

    Args:
        network: A prepared network whose layers have tables of one width; changed in place.
        teacher: The float network, in eval mode.
        batches: A few batches.
        loss: The distance; None is what suits the output.

    Returns:
        Whether all BatchNorms have the statistics of what reaches them now.
    """
    batches = list(batches)
    layers: dict[str, Any] = {
        name: layer
        for name, layer in qat_layers(network).items()
        if isinstance(layer, (*MULTIPLYING, nn.Embedding)) and not _is_tied(network, layer)
    }
    embeddings = [name for name, layer in layers.items() if not isinstance(layer, MULTIPLYING)]
    multiplying = [name for name in layers if name not in embeddings]
    norms = [name for name, module in teacher.named_modules() if has_statistics(module)]
    order, repeated = _calls(teacher, [*multiplying, *norms], batches)
    users = Counter(id(layers[name]._parameters["weight"]) for name in multiplying)
    several = [
        name for name in multiplying if name in repeated or users[id(layers[name]._parameters["weight"])] > 1
    ]
    _round_shared(layers, input_products(teacher, several, batches))
    gradients = gradient_products(_with_same_tensors(network), embeddings, batches, loss)
    for name in embeddings:
        if same_columns(name) in gradients:
            round_layer(layers[name], gradients[same_columns(name)], _DAMPING)
    with in_eval_mode(network):
        followed = _round_in_order(
            network, teacher, layers, [name for name in order if name not in several], batches
        )
    return followed.issuperset(norms) and not repeated.intersection(norms)


def _is_tied(network: nn.Module, layer: nn.Module) -> bool:
    """Whether an embedding and a layer of another kind have one weight."""
    weight = layer._parameters["weight"]
    users = [module for module in network.modules() if module._parameters.get("weight") is weight]
    return len({isinstance(user, nn.Embedding) for user in users}) > 1


@torch.no_grad()
def _calls(teacher: nn.Module, names: Iterable[str], batches: Iterable[Batch]) -> tuple[list[str], set[str]]:
    """Returns modules in the order in which they run, and those that a forward runs several times.

    Args:
        teacher: The float network, which runs.
        names: The modules; those that never run are left out.
        batches: Where some take other ways than the rest, their modules come after what they run after.
    """
    order: list[str] = []
    several: set[str] = set()
    ran: list[str] = []

    def note(name: str, *_: Any) -> None:
        ran.append(name)

    handles = [teacher.get_submodule(name).register_forward_pre_hook(partial(note, name)) for name in names]
    try:
        for batch in batches:
            ran.clear()
            with autocast():
                batch.run_whole(teacher)
            several.update(name for name, times in Counter(ran).items() if times > 1)
            place = 0
            for name in dict.fromkeys(ran):
                if name not in order:
                    order.insert(place, name)
                place = order.index(name) + 1
    finally:
        for handle in handles:
            handle.remove()
    return order, several


def _round_shared(layers: Mapping[str, Any], products: Mapping[str, Tensor]) -> None:
    """Rounds layers by their products; those that share a weight once, by the sum of theirs."""
    sharing: dict[int, list[str]] = {}
    for name in products:
        sharing.setdefault(id(layers[name]._parameters["weight"]), []).append(name)
    for names in sharing.values():
        product = products[names[0]]
        if all(products[name].shape == product.shape for name in names):
            for name in names[1:]:
                product = product + products[name]
            round_layer(layers[names[0]], product, _DAMPING)


def _round_in_order(
    network: nn.Module, teacher: nn.Module, layers: Mapping[str, Any], order: list[str], batches: list[Batch]
) -> set[str]:
    """Rounds layers as all batches come to them in both networks, and recalibrates BatchNorms likewise.

    Returns:
        The names of these.
    """
    recalibrated: set[str] = set()

    def meet(name: str, inputs: _Inputs) -> None:
        if name in layers:
            _round(name, layers[name], inputs, batches)
        elif _recalibrate(teacher.get_submodule(name), network.get_submodule(name), inputs):
            recalibrated.add(name)

    def run(model: nn.Module, batch: Batch) -> None:
        with autocast():
            batch.run_whole(model)

    forwards: dict[tuple[str, int], tuple[nn.Module, Callable[[], Any]]] = {}
    for number, batch in enumerate(batches):
        for kind, model in ((_FLOAT, teacher), (_ROUNDED, network)):
            own = _with_same_tensors(model)
            forwards[kind, number] = own, partial(run, own, batch)
    in_lockstep(forwards, order, meet)
    return recalibrated


def _with_same_tensors(model: nn.Module) -> nn.Module:
    """Returns a copy for a forward of its own, since modules may note in one what they need later in it.

    What rounding changes is the model's own: parameters, and BatchNorm's statistics. So are tensors that are no
    buffers, which may be large, and which modules replace rather than change.
    """
    shared: list[Tensor] = [*model.parameters()]
    for module in model.modules():
        shared += [value for value in vars(module).values() if isinstance(value, Tensor)]
        if has_statistics(module):
            shared += module.buffers(recurse=False)
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


@torch.no_grad()
def _round(name: str, layer: Any, inputs: _Inputs, batches: list[Batch]) -> None:
    """Rounds a layer by what its inputs are, and by what they lack of the float network's."""
    products: Tensor | None = None
    missing: Tensor | None = None
    count = samples = 0
    for number, batch in enumerate(batches):
        if (_ROUNDED, number) not in inputs:
            continue
        x = inputs[_ROUNDED, number]
        floating = isinstance(x, Tensor) and x.is_floating_point()
        own = multiplied(layer, layer.activation_fake_quant(x), batch, name) if floating else None
        if own is None:
            return  # it cannot be told what the layer multiplies
        own = own.float()
        meant = multiplied(layer, inputs.get((_FLOAT, number)), batch, name)
        lack = _lacking(own, meant)
        product, lacking = own.transpose(1, 2) @ own, lack.transpose(1, 2) @ own
        products = product if products is None else products.add_(product)
        missing = lacking if missing is None else missing.add_(lacking)
        count, samples = count + own.shape[1], samples + batch.size
    if products is None or missing is None or not count:
        return
    if bool(products.isfinite().all()) and bool(missing.isfinite().all()):
        telling = min(count, _OF_A_SAMPLE * samples)
        damping = _DAMPING * min(1.0, _VECTORS * products.shape[-1] / telling)
        round_layer(layer, products / count, damping, missing / count)


def _lacking(own: Tensor, meant: Tensor | None) -> Tensor:
    """Returns what vectors lack of those that are meant; nothing where they are not of the same sample.

    Networks that choose a way for each sample or token, as experts do, may choose otherwise once they are rounded.
    """
    if meant is None or meant.shape != own.shape:
        return torch.zeros_like(own)
    lack = meant.float() - own
    alike = lack.square().sum(-1, keepdim=True) <= own.square().sum(-1, keepdim=True)
    return torch.where(alike, lack, 0.0)


def _recalibrate(known: Any, norm: Any, inputs: _Inputs) -> bool:
    """Moves a BatchNorm's statistics by what the inputs of the two networks differ by; returns whether it could."""
    numbers = [number for kind, number in inputs if kind == _ROUNDED and (_FLOAT, number) in inputs]
    sampled, seen = (statistics_of(known, [inputs[kind, n] for n in numbers]) for kind in (_FLOAT, _ROUNDED))
    if sampled is None or seen is None:
        return False
    Statistics(known.running_mean, known.running_var).moved(sampled, seen).write(norm)
    return True
