"""Attention of sequences that lie end to end in one row, in C (varlen_attention.c), forward and backward, for training.

T tokens of all sequences   N query heads   K key heads   D numbers of a head
"""

import ctypes
import math
from collections.abc import Sequence
from ctypes import Structure, c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loradeck.native import reference
from loradeck.ops import compiler

SOURCE = Path(__file__).with_suffix(".c")
FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as in numbers.h
MULTIPLE = 16  # of D


class CRows(Structure):
    """A tensor (T, heads, D)."""

    _fields_ = (("at", c_void_p), ("token", c_int64), ("head", c_int64))

    @classmethod
    def of(cls, tensor: Tensor) -> "CRows":
        """Its numbers of a head lie side by side."""
        return cls(tensor.data_ptr(), tensor.stride(0), tensor.stride(1))


class CVarlenAttention(Structure):
    """The tensors and settings of one call."""

    _fields_ = (
        ("starts", c_void_p),
        ("order", c_void_p),
        *((name, c_int64) for name in ("count", "tokens", "longest", "heads", "key_heads", "dim", "format", "window")),
        ("scale", c_float),
        ("cap", c_float),
        *((name, CRows) for name in ("q", "k", "v", "out")),
        ("log_sums", c_void_p),
        ("grad", CRows),
        ("dq", CRows),
        ("dk", c_void_p),
        ("dv", c_void_p),
    )


def takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the C code computes the attention of queries (T, N, D), keys and values (T, K, D), on this machine."""
    return (
        all(type(each) is Tensor and each.is_cpu and each.dtype == query.dtype for each in (query, key, value))
        and query.dtype in FORMATS
        and query.shape[2] == key.shape[2] == value.shape[2]
        and query.shape[2] % MULTIPLE == 0
        and query.shape[1] % key.shape[1] == 0
        and not torch.compiler.is_compiling()
        and why_not_available() is None
    )


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int],
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention within each sequence: softmax(cap(scale · q kᵀ)) v, with sums in float32.

    Queries (T, N, D), keys and values (T, K, D), each key head for N / K query heads in a row, lengths of the
    sequences, whose sum is T -> (T, N, D). The scale is 1 / √D by default; a token sees `window` tokens, with itself.

    A sequence's result and gradients are the same bits whatever the others are, and with any number of threads. The
    backward pass saves the inputs, the output and a float32 for each token and query head.

    Raises:
        MemoryError: nothing was computed.
    """
    settings = (tuple(lengths), scale or 1 / math.sqrt(query.shape[2]), window or 0, softcap or 0.0)
    return _VarlenAttention.apply(query, key, value, settings)


class _VarlenAttention(torch.autograd.Function):
    @staticmethod
    # pyrefly: ignore [bad-override]  (torch declares any arguments)
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, settings: tuple[Any, ...]) -> Tensor:
        query, key, value = map(_rows, (query, key, value))
        out, log_sums = torch.empty(query.shape, dtype=query.dtype), torch.empty(query.shape[1], len(query))
        _call(query, key, value, out, log_sums, settings)
        ctx.settings = settings
        ctx.save_for_backward(query, key, value, out, log_sums)
        return out

    @staticmethod
    @once_differentiable
    # pyrefly: ignore [bad-override]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, out, log_sums = ctx.saved_tensors
        grad, dq = _rows(grad), torch.empty(query.shape, dtype=query.dtype)
        dk, dv = torch.empty(2, *query.shape)
        _call(query, key, value, out, log_sums, ctx.settings, (grad, dq, dk, dv))
        shared = (key.shape[1], query.shape[1] // key.shape[1])
        dk, dv = (each.unflatten(1, shared).sum(2).to(key.dtype) for each in (dk, dv))
        return dq, dk, dv, None


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(2) == 1 else tensor.contiguous()


def _call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    log_sums: Tensor,
    settings: tuple[Any, ...],
    gradients: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> None:
    """Write `out` and `log_sums`; with gradients (grad, dq, dk, dv), read these and write the last three."""
    lengths, scale, window, cap = settings
    tokens, heads, dim = query.shape
    starts = torch.tensor([0, *lengths]).cumsum(0)
    order = torch.tensor(lengths).argsort(descending=True, stable=True)
    call = CVarlenAttention(
        starts=starts.data_ptr(), order=order.data_ptr(), count=len(lengths), tokens=tokens, longest=max(lengths),
        heads=heads, key_heads=key.shape[1], dim=dim, format=FORMATS[query.dtype], window=window, scale=scale, cap=cap,
        q=CRows.of(query), k=CRows.of(key), v=CRows.of(value), out=CRows.of(out), log_sums=log_sums.data_ptr(),
    )  # fmt: skip
    if gradients:
        grad, dq, dk, dv = gradients
        call.grad, call.dq, call.dk, call.dv = CRows.of(grad), CRows.of(dq), dk.data_ptr(), dv.data_ptr()
    if _library().loradeck_varlen_attention(ctypes.byref(call), gradients is not None, torch.get_num_threads()):
        raise MemoryError("out of memory in attention; train on shorter examples, or on fewer tokens at once")


@cache
def why_not_available() -> str | None:
    """Compile the C code unless it is cached, and check it against the definition; None if it is usable."""
    lengths = (30, 70, 1)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            rng = torch.Generator().manual_seed(0)
            query, key, value = (torch.randn(101, heads, 48, generator=rng).requires_grad_() for heads in (4, 2, 2))
            sequences = zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
            definition = torch.cat([reference.attend(q, k, v, 48**-0.5, 3.0, 20) for q, k, v in sequences])
            result = varlen_attention(query, key, value, lengths, window=20, softcap=3.0)
            upstream = torch.randn(101, 4, 48, generator=rng)
            gradients = [torch.autograd.grad(each, (query, key, value), upstream) for each in (definition, result)]
            pairs = [(definition.detach(), result.detach()), *zip(*gradients, strict=True)]
            error = max(float((one - other).abs().max() / one.abs().max()) for one, other in pairs)
            if not error <= 1e-5:
                return f"is off by {error:.1e} on this machine"
    except Exception as error:  # compilers that are missing, or refuse this machine, raise no common type
        return f"is unavailable ({str(error).partition(chr(10))[0][:100] or type(error).__name__})"
    return None


@cache
def _library() -> ctypes.CDLL:
    library = compiler.load(SOURCE)
    library.loradeck_varlen_attention.argtypes = (ctypes.POINTER(CVarlenAttention), c_int, c_int)
    return library
