"""Quantised matrices with int8 activations compute what the definition says: in all builds."""

import ctypes

import pytest
import torch
from tests.native.test_quantised import random_blocks
from torch import Tensor

from loradeck.native import quantised
from loradeck.native.quantised import KINDS, Kind, Quantised, pack
from loradeck.native.reference import rounded

kinds = pytest.mark.parametrize(
    "kind", [kind for kind in KINDS.values() if kind.takes_int8], ids=lambda kind: kind.name
)


@pytest.fixture(autouse=True)
def this_build(compiled: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised, "any_library", lambda: compiled)


def matrix_of(kind: Kind, outputs: int = 192, inputs: int = 768) -> Quantised:
    """Random bits, but powers of two near 1."""
    data = torch.from_numpy(random_blocks(kind, outputs, inputs, seed=kind.number))
    if kind.name == "MXFP4":
        data[:, :: kind.bytes] = data[:, :: kind.bytes] % 16 + 120
    return pack(data, kind, inputs)


def inputs_of(rows: int, inputs: int) -> Tensor:
    """Rows of several sizes, and in each groups of several sizes."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, inputs, generator=generator)
    return x * torch.logspace(-3, 3, rows)[:, None] * torch.logspace(-2, 2, inputs // 32).repeat_interleave(32)


def product(parts: ctypes.CDLL, matrix: Quantised, x: Tensor) -> Tensor:
    """X · Wᵀ with x (rows, I) rounded to 8 bits -> (rows, O)."""
    x = x.contiguous()
    sums = torch.empty(len(matrix.tiles), len(x), 16)
    parts.rounded.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)
    parts.rounded(ctypes.byref(matrix.matrix), x.data_ptr(), len(x), sums.data_ptr())
    return sums.transpose(0, 1).flatten(1)[:, : matrix.outputs]


def bits(values: Tensor) -> Tensor:
    return values.view(torch.int32)


@kinds
def test_it_is_the_product_of_the_values_with_rounded_inputs(parts: ctypes.CDLL, halves: bool, kind: Kind) -> None:
    matrix = matrix_of(kind)
    x = inputs_of(9, matrix.inputs)
    x = x.bfloat16().float() if halves else x
    weight = matrix.dense().double()
    q = rounded(x).double()
    error = (product(parts, matrix, x) - q @ weight.T).abs()
    bound = q.abs().sum(1)[:, None] * weight.abs().amax(1)
    assert bool((error <= 1e-6 * bound).all())


@kinds
def test_a_row_has_the_same_bits_beside_any_others(parts: ctypes.CDLL, kind: Kind) -> None:
    """Others may not be finite."""
    matrix = matrix_of(kind)
    x = inputs_of(70, matrix.inputs)
    alone = torch.cat([product(parts, matrix, row[None]) for row in x])
    for rows in (2, 3, 8, 17, 70):
        assert torch.equal(bits(product(parts, matrix, x[:rows])), bits(alone[:rows]))
    x[3, 5], x[4, 40], x[5, -1] = torch.nan, torch.inf, -torch.inf
    broken = product(parts, matrix, x)
    assert bool(broken[3:6].isnan().all())
    others = [row for row in range(70) if row not in (3, 4, 5)]
    assert torch.equal(bits(broken[others]), bits(alone[others]))


def test_zeros_and_the_smallest_numbers_are_rounded_to_zeros(parts: ctypes.CDLL) -> None:
    matrix = matrix_of(KINDS["Q4_K"])
    x = torch.zeros(3, matrix.inputs)
    x[1] = 1e-45
    x[2] = -1e-38
    assert not product(parts, matrix, x).any()


def test_an_input_is_off_by_half_a_step_at_most() -> None:
    x = inputs_of(50, 640)
    step = x.unflatten(1, (-1, 32)).abs().amax(-1, keepdim=True) / 127
    off = (rounded(x) - x).unflatten(1, (-1, 32)).abs()
    assert bool((off <= 0.5001 * step).all())
    assert not rounded(torch.zeros(2, 64)).any()
