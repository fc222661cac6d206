"""Blocks are a matrix's numbers in another order, bit for bit."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from loradeck.native.blocks import FORMATS, INPUTS, OUTPUTS, pack, pad, padded, unpack

BITS = {2: torch.int16, 4: torch.int32}
SIZES = st.integers(1, 5)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(BITS[tensor.dtype.itemsize])


@given(st.sampled_from([*FORMATS]), st.integers(0, 5), SIZES, st.integers(0, 1000))
def test_a_matrix_comes_back_with_all_its_bits(dtype, tiles, groups, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    size = dtype.itemsize
    whole = torch.randint(-128, 128, (tiles * OUTPUTS, groups * INPUTS * size), generator=generator, dtype=torch.int8)
    weight = whole.view(dtype)  # any bits: also those of NaN, Inf and subnormal numbers
    blocks = pack(weight)
    assert blocks.shape == (tiles, groups, OUTPUTS * INPUTS)
    assert torch.equal(bits(unpack(blocks)), bits(weight))
    later = torch.cat([weight.flatten()[:1], weight.flatten()])[1:].view(weight.shape)  # begins within four bytes
    assert torch.equal(bits(pack(later)), bits(blocks))
    assert torch.equal(bits(pack(weight.T.contiguous().T)), bits(blocks))


@given(st.sampled_from([*FORMATS]), SIZES, SIZES)
def test_a_number_lies_where_the_step_looks_for_it(dtype, tiles, groups) -> None:
    weight = torch.arange(tiles * OUTPUTS * groups * INPUTS).view(tiles * OUTPUTS, -1).to(dtype)
    blocks = pack(weight)
    for output, i in ((0, 0), (tiles * OUTPUTS - 1, groups * INPUTS - 1), (OUTPUTS // 2, INPUTS // 2 + 1)):
        place = (i % INPUTS) // 2 * 32
        place += i % 2 * OUTPUTS + output % OUTPUTS if dtype == torch.float32 else output % OUTPUTS * 2 + i % 2
        assert blocks[output // OUTPUTS, i // INPUTS, place] == weight[output, i]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=3), st.sampled_from((1, 16, 32, 64)))
def test_what_is_added_is_zero(shape, step) -> None:
    tensor = torch.randn(shape)
    larger = pad(tensor, *(padded(size, step) for size in shape))
    assert all(size % step == 0 for size in larger.shape)
    assert torch.equal(larger[tuple(map(slice, shape))], tensor)
    assert larger.count_nonzero() == tensor.count_nonzero()
