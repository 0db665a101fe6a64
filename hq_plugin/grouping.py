"""Group sizes: for which layers steps and zero points of every few inputs are worth their bits.

A step for a whole channel must span the largest of its weights. Where a few inputs have much larger weights than
the others, as in the second layer of many transformers' feed-forward blocks, all others pay for them, and groups of
inputs with steps of their own are worth half a bit and more. Elsewhere they gain little at 4 bits and lose at 2
(docs/experiments.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hq_plugin.quantization import (
    STEP_BYTES,
    ZERO_BYTES,
    fake_quantize_weight,
    optimal_weight_qparams,
    optimal_weight_step,
    weight_rows,
)
from hq_plugin.sites import Site

#: What may be chosen beside whole channels; a width in the middle, at which errors are compared.
SIZES, REFERENCE_BITS = (128, 64, 32), 4
#: Whole channels, for which there are faster kernels, stay unless groups have less than this share of their error.
WORTH = 0.8


def worthwhile_group_size(sites: Sequence[Site], weights: Mapping[str, Tensor]) -> int:
    """Chooses the group size of sites that share their widths.

    Sizes are compared by the squared error at `REFERENCE_BITS` times `4 ** overhead`, the overhead being what steps
    and zero points take, in bits a weight: a bit more or less divides or multiplies the error by 4.

    Args:
        sites: Linear layers or held parameters; others have whole channels. (A row of an embedding is one token's,
            and many get one or two bits.)
        weights: Float weight of each site, by name.

    Returns:
        Inputs of a group, or 0 for whole channels.
    """
    if any(site.kind == "embedding" for site in sites):
        return 0
    sizes = [size for size in SIZES if all(site.takes_groups(size) for site in sites)]
    if not sizes:
        return 0
    costs = {size: sum(_cost(weights[site.name].detach(), size) for site in sites) for size in (0, *sizes)}
    best = min(sizes, key=lambda size: costs[size])
    return best if costs[best] < WORTH * costs[0] else 0


@torch.no_grad()
def _cost(weight: Tensor, size: int) -> float:
    # All of it: one channel with a large weight may have most of the error.
    rows = weight_rows(weight.reshape(-1, weight.shape[-1]).float(), size)
    zero: Tensor | None = None
    if size:
        step, zero = optimal_weight_qparams(rows, REFERENCE_BITS)
        overhead = 8 * (STEP_BYTES + ZERO_BYTES) / size
    else:
        step = optimal_weight_step(rows, REFERENCE_BITS)
        overhead = 8 * STEP_BYTES / weight.shape[-1]
    error = (fake_quantize_weight(rows, step, REFERENCE_BITS, zero) - rows).square().mean()
    return float(error) * weight.numel() * 4**overhead
