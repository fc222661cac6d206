"""The step's own functions of numbers, compared with torch's over all that they may meet."""

import ctypes

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from loradeck.native.blocks import FORMATS
from loradeck.native.model import ACTIVATIONS

INF, NAN = float("inf"), float("nan")
EDGES = [
    0.0,
    -0.0,
    1e-45,
    -1e-45,
    1e-38,
    -1e-38,
    86.9,
    87.1,
    88.6,
    88.8,
    -86.9,
    -87.1,
    -104.0,
    1e30,
    -1e30,
    3.4e38,
    INF,
    -INF,
    NAN,
]


def numbers() -> Tensor:
    """Return numbers of all sizes, and the edges; a multiple of 64 of them."""
    dense = torch.cat((torch.linspace(-90, 90, 20000), torch.linspace(-1, 1, 20000), torch.logspace(-40, 38, 2000)))
    edges = torch.tensor(EDGES)
    whole = torch.cat((dense, edges))
    return torch.cat((whole, whole[: -len(whole) % 64])).contiguous()


def computed(function, x: Tensor, *more: int) -> Tensor:
    x = x.clone()
    function(ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(len(x)), *map(ctypes.c_int64, more))
    return x


def test_exponential(parts) -> None:
    x = numbers()
    y, exact = computed(parts.exponentials, x), x.double().clamp(min=-87.0).exp()
    finite = (x <= 88.7) | x.isnan()
    assert torch.equal(y[~finite], torch.full_like(y[~finite], INF))
    torch.testing.assert_close(y[finite].double(), exact[finite], rtol=2e-7, atol=0, equal_nan=True)


def test_tangent(parts) -> None:
    x = numbers()
    torch.testing.assert_close(computed(parts.tangents, x), x.tanh(), rtol=1e-6, atol=2e-7, equal_nan=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(parts, activation) -> None:
    x = numbers()
    x = x[x.abs() < 1e12]
    x = x[: len(x) // 64 * 64].contiguous()
    exact = (
        F.silu(x.double())
        if activation == "silu"
        else F.gelu(x.double(), approximate="tanh" if "tanh" in activation else "none")
    )
    y = computed(parts.activations, x, ACTIVATIONS[activation])
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=3e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_rounded_as_torch_rounds_them(parts, dtype) -> None:
    middle = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float().view(torch.int32)
    step = 2**16 if dtype == torch.bfloat16 else 2**13
    x = torch.cat([middle + step // 2 + by for by in (-1, 0, 1)]).view(torch.float32)  # at and beside each tie
    x = torch.cat((x, numbers()))
    out = torch.empty(len(x), dtype=torch.int16)
    parts.round_to(
        ctypes.c_void_p(out.data_ptr()),
        ctypes.c_void_p(x.data_ptr()),
        ctypes.c_int64(len(x)),
        ctypes.c_int64(FORMATS[dtype]),
    )
    nan = x.isnan()
    assert out.view(dtype)[nan].isnan().all()
    assert torch.equal(out.view(dtype)[~nan], x.to(dtype)[~nan])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_read_as_torch_reads_them(parts, dtype) -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    out = torch.empty(2**16)
    parts.widen_from(
        ctypes.c_void_p(out.data_ptr()),
        ctypes.c_void_p(every.data_ptr()),
        ctypes.c_int64(2**16),
        ctypes.c_int64(FORMATS[dtype]),
    )
    torch.testing.assert_close(out, every.view(dtype).float(), rtol=0, atol=0, equal_nan=True)
