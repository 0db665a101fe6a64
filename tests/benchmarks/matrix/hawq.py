"""HAWQ-V2: the mean trace of each layer's Hessian times its squared rounding error (Dong et al., arXiv:1911.03852).

The Hessian is that of the distance to the teacher (for classes, cross-entropy with the teacher's own soft
predictions, which differs from the KL divergence to it by a constant; for embeddings the relative squared error),
at the teacher itself, where it equals the Gauss-Newton matrix and has no negative direction. That needs no
labels, so that it is the same for every model. Traces are Hutchinson's estimates: the mean over random signs `v`
of `v · Hv`, one `v` for all layers at once, whose cross terms vanish in the mean. Activations add nothing:
HAWQ-V2 has traces of weights at a fixed width of activations.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from hq_plugin import torch_ao
from hq_plugin.batch import Batch
from hq_plugin.cost import Table
from hq_plugin.distillation import LossFunction, class_scores
from hq_plugin.qat_layers import qat_layers
from hq_plugin.session import Session

#: Random sign vectors, and training samples of each.
PROBES, SAMPLES = 16, 64


def hessian_traces(
    model: nn.Module,
    names: Sequence[str],
    batches: Sequence[Batch],
    loss: LossFunction,
    probes: int = PROBES,
    seed: int = 0,
) -> dict[str, float]:
    """Estimates the trace of the Hessian of the distance to the model itself, for the weight of each layer.

    Args:
        model: The float model; it is not changed.
        names: Layers with a weight.
        batches: Data; the probes take them in turn.
        loss: The distance.
        probes: Random sign vectors.
        seed: Of the signs.
    """
    student = copy.deepcopy(model).eval().requires_grad_(False)
    weights: dict[str, Tensor] = {}
    for name in names:
        weight: Any = student.get_submodule(name)._parameters["weight"]
        weights[name] = weight.requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    traces = dict.fromkeys(names, 0.0)
    # Fused attention has no second derivative.
    with sdpa_kernel(SDPBackend.MATH), _Pieces():
        for number in range(probes):
            batch = batches[number % len(batches)]
            with torch.no_grad():
                target = batch.run(model)
            value = loss(batch.run(student), target)
            gradients = torch.autograd.grad(value, list(weights.values()), create_graph=True, allow_unused=True)
            signs = [torch.randint(0, 2, w.shape, generator=generator).to(w) * 2 - 1 for w in weights.values()]
            used = [(g, v) for g, v in zip(gradients, signs, strict=True) if g is not None]
            product = torch.stack([(g * v).sum() for g, v in used]).sum()
            rows = torch.autograd.grad(product, list(weights.values()), allow_unused=True)
            for name, row, sign in zip(weights, rows, signs, strict=True):
                if row is not None:
                    traces[name] += float((row * sign).sum()) / probes
    return traces


class _Pieces(TorchFunctionMode):
    """Computes otherwise what torch has no second derivative of: hard sigmoid and swish, embeddings of no token."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.hardsigmoid, F.hardswish):
            gate = F.relu6(args[0] + 3) / 6
            return gate if func is F.hardsigmoid else args[0] * gate
        if func is F.embedding and args[0].numel() == 0:
            return args[1].index_select(0, args[0].reshape(-1)).reshape(*args[0].shape, args[1].shape[1])
        return func(*args, **(kwargs or {}))


def twice_differentiable(loss: LossFunction) -> LossFunction:
    """Returns a distance with second derivatives: hq_plugin's KL divergence computes its first by hand."""

    def distance(student: Any, teacher: Any) -> Tensor:
        scores, expected = class_scores(student), class_scores(teacher)
        if scores is None or expected is None:
            return loss(student, teacher)
        rows, goals = (part.reshape(-1, part.shape[-1]).float() for part in (scores, expected))
        return F.kl_div(F.log_softmax(rows, -1), F.log_softmax(goals, -1), reduction="batchmean", log_target=True)

    return distance


@torch.no_grad()
def rounding_errors(session: Session, bits: int) -> dict[str, float]:
    """Returns the summed squared error of each site's weight at one width (or the nearest below that it has)."""
    space = session.space
    torch_ao.apply_policy(session.network, space.policy(space.nearest_uniform(bits, max(space.activation_bits))))
    errors = {}
    for name, layer in qat_layers(session.network).items():
        weight: Any = layer._parameters["weight"]
        quantizer: Any = layer.weight_fake_quant
        errors[name] = float((quantizer(weight) - weight).square().sum())
    return errors


def hawq_losses(session: Session, probes: int = PROBES, samples: int = SAMPLES) -> Table:
    """Returns the additive losses of HAWQ-V2, `[groups, weight widths, activation widths]`.

    Args:
        session: A session that is not meta-trained: its weights are those of the float model, rounded.
        probes: Random sign vectors.
        samples: Training samples of each.
    """
    space = session.space
    sites = [site for site in space.table if site.owner == site.name]
    device = next(session.teacher.parameters()).device
    batches, stream = [], iter(session.data.train)
    for _ in range(min(4, probes)):
        batch = next(stream, None)
        if batch is None:
            break
        batches.append(batch.to(device).take(samples))
    names = [site.name for site in sites]
    loss = twice_differentiable(session.loss)
    traces = hessian_traces(session.teacher, names, batches, loss, probes, session.config.seed)
    errors = {bits: rounding_errors(session, bits) for bits in space.weight_bits}
    losses = np.full(session.costs.weight_bytes.shape, np.inf)
    for g, group in enumerate(space.groups):
        for w, bits in enumerate(group.weight_bits):
            losses[g, w, : len(group.activation_bits)] = sum(
                max(traces[site.name], 0.0) / site.numel * errors[bits][site.name]
                for site in group.sites
                if site.owner == site.name
            )
    return losses
