import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hq_plugin.packing import pack_bits, packed_bytes, unpack_bits
from hq_plugin.quantization import weight_range


@given(bits=st.integers(1, 8), shape=st.lists(st.integers(1, 9), min_size=1, max_size=4), seed=st.integers(0, 99))
@settings(max_examples=150, deadline=None)
def test_round_trip(bits: int, shape: list[int], seed: int) -> None:
    low, high = weight_range(bits)
    generator = torch.Generator().manual_seed(seed)
    integers = torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int8)
    packed = pack_bits(integers, bits)
    assert packed.dtype == torch.uint8
    assert packed.numel() == packed_bytes(integers.numel(), bits)
    assert torch.equal(unpack_bits(packed, bits, shape), integers)


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_width_costs_its_bits(bits: int) -> None:
    assert packed_bytes(8000, bits) == 1000 * bits


def test_large_tensors_are_unpacked_in_parts() -> None:
    integers = torch.randint(-4, 4, (3, 1 << 20), dtype=torch.int8)
    assert torch.equal(unpack_bits(pack_bits(integers, 3), 3, integers.shape), integers)


def test_layout_is_bit_planes() -> None:
    # Codes 0..3 are -2..1: the first byte holds the low bits, the first value in the lowest place.
    packed = pack_bits(torch.tensor([-2, -1, 0, 1, -2, -2, -2, -2], dtype=torch.int8), 2)
    assert packed.tolist() == [0b1010, 0b1100]


def test_out_of_range_and_wrong_length() -> None:
    with pytest.raises(ValueError, match="do not fit 3 bits"):
        pack_bits(torch.tensor([4], dtype=torch.int8), 3)
    with pytest.raises(ValueError, match="which take"):
        unpack_bits(torch.zeros(3, dtype=torch.uint8), 2, (9,))
