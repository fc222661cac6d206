"""Quantised matrices have the values of gguf's own de-quantisation, all bits of them, and products are theirs."""

import ctypes
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import gguf
from loradeck.native import product as products
from loradeck.native import quantised
from loradeck.native.product import product
from loradeck.native.quantised import KINDS, Kind, Quantised, pack

SCALES = {  # where the float16 numbers of a block lie
    "Q8_0": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "IQ4_NL": (0,), "MXFP4": (),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_XS": (0,),
    "U4": (0,), "NF4": (), "I8": (),
}  # fmt: skip
SINGLE = ("NF4", "I8")  # a block begins with a scale in float32
NORMAL = (  # the quantiles of bitsandbytes
    -1, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1,
)  # fmt: skip
OTHERS = ("U4", "NF4", "I8")  # of GPTQ and AWQ, and of bitsandbytes
SPECIAL = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 6e-8, -6e-8, 65504.0], np.float16)
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)


@pytest.fixture(autouse=True)
def this_build(compiled: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and products are those of each build."""
    monkeypatch.setattr(quantised, "any_library", lambda: compiled)
    monkeypatch.setattr(products, "library", lambda _: compiled)


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def random_blocks(kind: Kind, outputs: int, inputs: int, seed: int = 0) -> np.ndarray:
    """Rows of blocks of random bits (outputs, bytes of a row), whose scales are finite."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (outputs, inputs // kind.inputs, kind.bytes), dtype=np.uint8)
    for place in SCALES[kind.name]:
        upper = blocks[..., place + 1]
        upper[upper & 0x7C == 0x7C] &= 0xBF
    if kind.name in SINGLE:
        scales = rng.standard_normal(blocks.shape[:2]).astype(np.float32)
        blocks[..., :4] = scales.view(np.uint8).reshape(*blocks.shape[:2], 4)
    return blocks.reshape(outputs, -1)


def values_of(blocks: np.ndarray, kind: Kind) -> Tensor:
    """The values by gguf; of other kinds by definition."""
    with np.errstate(all="ignore"):
        if kind.name not in OTHERS:
            return torch.from_numpy(gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind.name]))
        scales, codes = np.split(blocks.reshape(-1, kind.bytes), [kind.bytes - (32 if kind.name == "I8" else 16)], 1)
        if kind.name == "I8":
            values = scales.copy().view(np.float32) * codes.view(np.int8)
        else:
            codes = np.concatenate([codes & 15, codes >> 4], 1)
            if kind.name == "NF4":
                values = scales.copy().view(np.float32) * np.array(NORMAL, np.float32)[codes]
            else:
                values = scales[:, :2].copy().view(np.float16) * (codes - scales[:, 2:].astype(np.float32))
    return torch.from_numpy(values.reshape(len(blocks), -1))


def packed(blocks: np.ndarray, kind: Kind, order: Tensor | None = None) -> Quantised:
    return pack(torch.from_numpy(blocks), kind, blocks.shape[1] // kind.bytes * kind.inputs, order)


def check(values: Tensor, expected: Tensor) -> None:
    """Finite values are equal, all bits of them but a zero's sign, and others are in the same places."""
    finite = expected.isfinite()
    assert torch.equal(values.isfinite(), finite)
    assert torch.equal(values[finite], expected[finite])


def test_kinds_are_those_of_gguf() -> None:
    assert KINDS.keys() == SCALES.keys()
    assert {name: (kind.inputs, kind.bytes) for name, kind in KINDS.items() if name not in OTHERS} == {
        name: gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] for name in SCALES if name not in OTHERS
    }
    assert all(name == kind.name for name, kind in KINDS.items())


# ---- values


@kinds
def test_values_are_those_of_gguf(kind: Kind, threads: int) -> None:
    """All codes and their scales occur in so many blocks."""
    blocks = random_blocks(kind, 1030, 1024)
    check(packed(blocks, kind).dense(), values_of(blocks, kind))


@kinds
def test_every_scale_is_read(kind: Kind) -> None:
    """All float16 numbers, those that are not finite too; every 15th for kinds whose blocks are long."""
    numbers = np.arange(0, 1 << 16, 1 if kind.inputs == 32 else 15, dtype=np.uint16)
    for place in SCALES[kind.name]:
        blocks = random_blocks(kind, len(numbers), kind.inputs)
        blocks[:, place : place + 2] = numbers.view(np.uint8).reshape(-1, 2)
        check(packed(blocks, kind).dense(), values_of(blocks, kind))


def test_every_power_of_two_is_read() -> None:
    kind = KINDS["MXFP4"]
    blocks = random_blocks(kind, 256, 32)
    blocks[:, 0] = np.arange(256)
    check(packed(blocks, kind).dense(), values_of(blocks, kind))


@given(
    st.sampled_from([*KINDS.values()]),
    st.integers(1, 70),
    st.integers(1, 4),
    st.integers(0, 1 << 30),
    st.floats(0.0, 1.0),
)
def test_any_bytes_in_any_shape_are_decoded(kind: Kind, outputs: int, count: int, seed: int, special: float) -> None:
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (outputs, count, kind.bytes), dtype=np.uint8)
    for place in SCALES[kind.name]:
        chosen = rng.random((outputs, count)) < special
        numbers = rng.choice(SPECIAL, (outputs, count)).view(np.uint8).reshape(outputs, count, 2)
        blocks[..., place : place + 2] = np.where(chosen[..., None], numbers, blocks[..., place : place + 2])
    blocks = blocks.reshape(outputs, -1)
    matrix = packed(blocks, kind)
    assert matrix.shape == (outputs, count * kind.inputs)
    check(matrix.dense(), values_of(blocks, kind))
    y = product(torch.randn(3, matrix.inputs), matrix, outputs, None, halves=False)
    assert y.shape == (3, outputs), "NaN and Inf are numbers like others"


@given(st.sampled_from([*KINDS.values()]), st.integers(1, 70), st.data())
def test_outputs_come_in_the_order_that_is_asked_for(kind: Kind, rows: int, data: st.DataObject) -> None:
    order = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=70)))
    blocks = random_blocks(kind, rows, 256)
    check(packed(blocks, kind, order).dense(), values_of(blocks, kind)[order])


@given(st.sampled_from([*KINDS.values()]), st.integers(1, 70), st.data())
def test_parts_are_those_of_the_whole(kind: Kind, outputs: int, data: st.DataObject) -> None:
    matrix = packed(random_blocks(kind, outputs, 512), kind)
    whole = matrix.dense()
    start, stop = (data.draw(st.integers(-outputs - 2, outputs + 2)) for _ in range(2))
    assert torch.equal(matrix.dense(slice(start, stop)), whole[start:stop])
    index = torch.tensor(data.draw(st.lists(st.lists(st.integers(0, outputs - 1), min_size=2, max_size=2))))
    assert torch.equal(matrix.rows(index.long().view(-1, 2)), whole[index.long().view(-1, 2)])
    places = torch.tensor(data.draw(st.lists(st.integers(0, whole.numel() - 1))), dtype=torch.int64)
    assert torch.equal(matrix.values(places), whole.flatten()[places])


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_the_values_rounded_once(dtype: torch.dtype, kind: Kind) -> None:
    blocks = random_blocks(kind, 70, 1024)
    values = packed(blocks, kind).dense(dtype=dtype)
    assert values.dtype == dtype
    check(values, values_of(blocks, kind).to(dtype))


def test_a_matrix_is_a_copy_of_what_may_be_a_view() -> None:
    kind = KINDS["Q4_K"]
    file = np.zeros((5, 3 * kind.bytes), np.uint8)
    view = file[:, kind.bytes : 2 * kind.bytes]  # other bytes lie between the rows
    view[:] = random_blocks(kind, 5, 256)
    expected = values_of(view.copy(), kind)
    matrix = packed(view, kind)
    file[:] = 0
    assert torch.equal(matrix.dense(), expected)


def test_no_outputs_are_no_values() -> None:
    matrix = packed(np.zeros((0, 144), np.uint8), KINDS["Q4_K"])
    assert matrix.dense().shape == (0, 256)
    assert product(torch.ones(2, 256), matrix, 0, None, halves=False).shape == (2, 0)


@pytest.mark.parametrize(
    ("data", "inputs", "order"),
    [
        (torch.zeros(4, 144), 256, None),
        (torch.zeros(576, dtype=torch.uint8), 256, None),
        (torch.zeros(4, 143, dtype=torch.uint8), 256, None),
        (torch.zeros(4, 144, dtype=torch.uint8), 512, None),
        (torch.zeros(4, 144, dtype=torch.uint8), 255, None),
        (torch.zeros(4, 144, dtype=torch.uint8), 256, torch.tensor([0, 4])),
        (torch.zeros(4, 144, dtype=torch.uint8), 256, torch.tensor([-1])),
    ],
    ids=["floats", "flat", "short", "long", "no multiple", "order", "negative order"],
)
def test_sizes_that_do_not_fit_are_refused(data: Tensor, inputs: int, order: Tensor | None) -> None:
    with pytest.raises(ValueError, match="row"):
        pack(data, KINDS["Q4_K"], inputs, order)


def test_rows_that_are_not_there_are_refused() -> None:
    matrix = packed(random_blocks(KINDS["Q4_0"], 3, 32), KINDS["Q4_0"])
    for row in (3, -1):
        with pytest.raises(IndexError, match="3 rows"):
            matrix.rows(torch.tensor([0, row]))


# ---- products


def linear_blocks(kind: Kind, outputs: int, inputs: int, seed: int = 0) -> np.ndarray:
    """Blocks whose values are as large as a linear's: their standard deviation is about 1 / √inputs."""
    blocks = random_blocks(kind, outputs, inputs, seed).reshape(-1, kind.bytes)
    rng = np.random.default_rng(seed)
    scales = rng.uniform(0.5, 1.5, len(blocks)) * rng.choice([-1, 1], len(blocks))

    def store(scales: np.ndarray) -> None:
        for place in SCALES[kind.name]:
            blocks[:, place : place + 2] = scales.astype(np.float16).view(np.uint8).reshape(-1, 2)
        if kind.name in SINGLE:
            blocks[:, :4] = scales.astype(np.float32).view(np.uint8).reshape(-1, 4)
        if kind.name == "MXFP4":
            blocks[:, 0] = 127 + np.round(np.log2(abs(scales)))

    store(scales)
    store(scales / (float(values_of(blocks, kind).std()) * inputs**0.5))
    return blocks.reshape(outputs, -1)


@kinds
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 1, 256), (3, 70, 512), (17, 33, 1024), (64, 64, 256)])
def test_a_product_is_that_of_the_values(
    kind: Kind, rows: int, outputs: int, inputs: int, threads: int, halves: bool
) -> None:
    matrix = packed(linear_blocks(kind, outputs, inputs), kind)
    generator = torch.Generator().manual_seed(1)
    x, bias = torch.randn(rows, inputs, generator=generator), torch.randn(outputs, generator=generator)
    weight = matrix.dense()
    if halves:
        x, weight = x.bfloat16().float(), weight.bfloat16().float()
    y = product(x, matrix, outputs, bias, halves=halves)
    exact = F.linear(x.double(), weight.double(), bias.double())
    scale = float(F.linear(x.double().abs(), weight.double().abs()).max())  # of what is added up
    assert float((y.double() - exact).abs().max()) <= 2e-6 * scale


@kinds
def test_a_row_has_its_bits_in_any_batch(kind: Kind, threads: int) -> None:
    matrix = packed(linear_blocks(kind, 70, 512), kind)
    x = torch.randn(37, 512, generator=torch.Generator().manual_seed(1))
    batch = product(x, matrix, 70, None, halves=False)
    alone = torch.cat([product(row[None], matrix, 70, None, halves=False) for row in x])
    assert torch.equal(batch, alone)
    torch.set_num_threads(2)
    assert torch.equal(batch, product(x, matrix, 70, None, halves=False))
