"""Group sizes: for which layers and widths steps and zero points of every few inputs are worth their bits.

A step for a whole channel must span the largest of its weights. Where a few inputs have much larger weights than
the others, as in the second layer of many transformers' feed-forward blocks, all others pay for them. And what a
group's step takes is little beside 6 bits a weight, and much beside 2 (docs/experiments.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hq_plugin.optimal_qparams import optimal_group_qparams
from hq_plugin.quantization import fake_quantize_weight, weight_rows
from hq_plugin.sites import Site
from hq_plugin.stored_qparams import STEP_BYTES, ZERO_BITS

#: The largest size, of whole channels if these may be chosen, stays unless another has less than this share of its
#: error: fewer steps are faster, and training may make up for a little.
WORTH = 0.95
#: Widths above take what this one takes: what differs there is far below the error of narrower layers.
WIDEST = 5
#: Weights of a site that are looked at, channels from all over it.
_SAMPLE = 1 << 18


def worthwhile_group_sizes(
    sites: Sequence[Site], weights: Mapping[str, Tensor], widths: Sequence[int], sizes: Sequence[int]
) -> tuple[int, ...]:
    """Chooses a group size for each width of sites that share their widths.

    Sizes are compared by the squared error at a width times `4 ** overhead`, the overhead being what steps and zero
    points take, in bits a weight: a bit more or less divides or multiplies the error by 4.

    Args:
        sites: Linear layers or held parameters; others have whole channels. (A row of an embedding is one token's,
            and many get one or two bits.)
        weights: Float weight of each site, by name.
        widths: The widths, 1 to 8.
        sizes: What may be chosen: inputs of a group, or 0 for whole channels. Those that do not divide the inputs
            of all sites are left out.

    Returns:
        A size for each width; 0 where there is nothing to choose.
    """
    possible = [size for size in sizes if size and all(site.takes_groups(size) for site in sites)]
    if not possible or any(site.kind == "embedding" for site in sites):
        return (0,) * len(widths)
    ordered = ([0] if 0 in sizes else []) + sorted(set(possible), reverse=True)
    chosen: dict[int, int] = {}
    for bits in sorted({min(width, WIDEST) for width in widths}):
        costs = {size: sum(_cost(weights[site.name].detach(), size, bits) for site in sites) for size in ordered}
        best = min(ordered, key=lambda size: costs[size])
        chosen[bits] = best if costs[best] < WORTH * costs[ordered[0]] else ordered[0]
    return tuple(chosen[min(width, WIDEST)] for width in widths)


@torch.no_grad()
def _cost(weight: Tensor, size: int, bits: int) -> float:
    channels = weight.reshape(-1, weight.shape[-1])
    channels = channels[:: max(1, channels.numel() // _SAMPLE)].float()
    step, zero = optimal_group_qparams(channels, bits, size)
    overhead = (8 * STEP_BYTES + ZERO_BITS) / size if size else 8 * STEP_BYTES / weight.shape[-1]
    rows = weight_rows(channels, size)
    error = (fake_quantize_weight(rows, step, bits, zero) - rows).square().mean()
    return float(error) * weight.numel() * 4**overhead
