"""Bit packing: integers of 1 to 8 bits in exactly that many bits each, and back.

Bit planes: every 8 values become `bits` bytes, and byte j of such a group holds bit j of its 8 values
(the first value in the lowest bit). So every width, odd ones too, costs `ceil(values / 8) * bits` bytes.
Values are stored as unsigned codes, `integer - smallest`. Nothing here knows about steps or layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hq_plugin.quantization import weight_range

#: Groups of 8 values unpacked at once: bounds the memory of unpacking to a few MB beside the result.
_CHUNK = 1 << 17


def packed_bytes(numel: int, bits: int) -> int:
    """Returns the bytes that `numel` integers of `bits` bits take."""
    return -(-numel // 8) * bits


def pack_bits(integers: Tensor, bits: int) -> Tensor:
    """Packs integers.

    Args:
        integers: int8, any shape, inside `weight_range(bits)`.
        bits: 0 to 8.

    Returns:
        uint8, `[packed_bytes(numel, bits)]`.

    Raises:
        ValueError: An integer lies outside its width.
    """
    low, high = weight_range(bits)
    flat = integers.detach().reshape(-1).to(torch.int16)
    if flat.numel() and (int(flat.min()) < low or int(flat.max()) > high):
        raise ValueError(
            f"Integers from {int(flat.min())} to {int(flat.max())} do not fit {bits} bits ({low} to {high})."
        )
    if bits == 0:
        return flat.new_empty(0, dtype=torch.uint8)
    codes = (flat - low).to(torch.uint8)
    codes = torch.nn.functional.pad(codes, (0, -len(codes) % 8)).view(-1, 8)
    places = torch.arange(8, dtype=torch.uint8, device=codes.device)
    planes = [(((codes >> bit) & 1) << places).sum(1, dtype=torch.uint8) for bit in range(bits)]
    return torch.stack(planes, dim=1).reshape(-1)


def unpack_bits(packed: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    """Unpacks integers; the inverse of `pack_bits`.

    Args:
        packed: uint8, `[packed_bytes(numel, bits)]`.
        bits: 0 to 8.
        shape: Shape of the result.

    Returns:
        int8, of shape `shape`.

    Raises:
        ValueError: `packed` has not the length that the shape needs.
    """
    numel = math.prod(shape)
    if packed.numel() != packed_bytes(numel, bits):
        raise ValueError(
            f"{packed.numel()} packed bytes are not {numel} integers of {bits} bits, which take "
            f"{packed_bytes(numel, bits)}."
        )
    if bits == 0:
        return torch.zeros(tuple(shape), dtype=torch.int8, device=packed.device)
    planes = packed.view(-1, bits)
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    result = torch.empty(planes.shape[0], 8, dtype=torch.uint8, device=packed.device)
    for start in range(0, planes.shape[0], _CHUNK):
        part = planes[start : start + _CHUNK]
        out = result[start : start + _CHUNK].zero_()
        for bit in range(bits):
            out |= ((part[:, bit, None] >> places) & 1) << bit
    low, _ = weight_range(bits)
    # Codes are 0..255 and integers -128..127: the difference wraps to the right int8.
    return (result.view(-1)[:numel].to(torch.int16) + low).to(torch.int8).view(tuple(shape))
