"""The update of linear layers on a GPU, for short segments, as two Triton kernels; outside autograd.

The kernels read each adapter's weights by address, where the adapter keeps them, as cpu.c does. A token reads the
weights of its own adapters only, so a neighbour's NaN stays there. Only `dispatch` imports this module, if the package
triton is installed; torch's builds for CUDA bring it.

T tokens   K pairs of a token and an adapter   M adapters   P pieces of I   W ranks, a power of two
I features in   O features out   r an adapter's rank
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from loradeck.ops import reference
from loradeck.ops.layer_kinds import LinearKind
from loradeck.ops.mapping import LoraMapping
from loradeck.ops.segments import Segments
from loradeck.ops.weights import LayerAdapters, LoraWeights

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # float64 would lose what float32 sums cannot hold
PIECE = 1024  # features in that one program reads; few tokens alone would leave most of a GPU idle
TILE = 4096  # numbers of a matrix that a program holds at once
RANKS = 64  # at most, of a tile
LONG = 64  # tokens of a segment; from here on two dense products. Not measured on a GPU


def is_long(tokens: int, _: int) -> bool:
    """Whether a segment uses two dense products in place of the kernels, whatever its rank."""
    return tokens > LONG


def lora(x: Tensor, y: Tensor, adapters: LayerAdapters, segments: Segments) -> Tensor:
    """H[k] = A_a x[t];  y[t] += Σ_k w_k · scaling_a · B_a H[k] over the pairs k = (t, a) of t; sums in float32.

    x the layer's input · y the base's output for it, updated in place -> y.
    """
    kind = adapters.kind
    items, z = kind.items(x), kind.positions(y)
    with torch.cuda.device_of(z):  # Triton launches on the current device, whatever device the tensors are on
        _update(items, z, adapters, segments)
    return kind.restore(z, y)


def why_not_available(device: torch.device) -> str | None:
    """Check the kernels there against the definition; None if they are usable."""
    mapping = LoraMapping((*(((i, 1.0),) for i in range(4)), (), ((1, -0.5), (0, 2.0))), (1,) * 6)
    kind = LinearKind(48, 40)
    try:
        # The first call may be inside inference mode, whose tensors have no version counter.
        with torch.inference_mode(False), torch.no_grad():
            rng = torch.Generator().manual_seed(0)
            x, y, a, b = (torch.randn(shape, generator=rng) for shape in ((6, 48), (6, 40), (8, 48), (40, 8)))
            weights = tuple(LoraWeights(a[:r], b[:, -r:], 0.2) for r in (5, 6, 7, 8))
            moved = tuple(LoraWeights(each.a.to(device), each.b.to(device), each.scaling) for each in weights)
            expected = reference.lora(x, y, LayerAdapters(kind, weights), mapping)
            adapters, segments = LayerAdapters(kind, moved), mapping.segments(1, device)
            result = lora(x.to(device), y.to(device, copy=True), adapters, segments).cpu()
    except Exception as error:  # compilers that are missing, or refuse this device, raise no common type
        return f"is unavailable ({str(error).partition(chr(10))[0][:100] or type(error).__name__})"
    error = float((result - expected).abs().max())
    return None if error <= 1e-3 else f"is off by {error:.1e} on this device"


def _update(items: Tensor, z: Tensor, adapters: LayerAdapters, segments: Segments) -> None:
    """z[t] += Σ_{k of t} w_k · scaling_a · B_a (A_a items[t]): items (T, I), z (T, O)."""
    table, scaling, _ = adapters.addresses(segments)  # the allocator keeps memory for kernels that are under way
    order, starts = segments.by_token
    count, inside, outside = len(order), items.shape[1], z.shape[1]
    width = triton.next_power_of_2(max(adapters.rank, 1))
    piece, ranks = min(PIECE, triton.next_power_of_2(inside)), min(width, RANKS)
    pieces = triton.cdiv(inside, piece)
    h = torch.empty(pieces, count, width, dtype=torch.float32, device=z.device)
    _shrink[(count, pieces, width // ranks)](
        items, table, h, segments.token_indices, segments.pair_adapters,
        inside, count, items.stride(0), items.stride(1),
        W=width, R=ranks, BLOCK=min(TILE // ranks, piece), PIECE=piece,
    )  # fmt: skip
    block = min(TILE // ranks, triton.next_power_of_2(outside))
    _expand[(len(z), triton.cdiv(outside, block))](
        h, table, scaling, z, starts, order, segments.pair_adapters, segments.weights,
        outside, count, pieces, z.stride(0), z.stride(1),
        W=width, R=ranks, BLOCK=block,
    )  # fmt: skip


@triton.jit
def _load(address, offsets, mask, code):
    """Load numbers at an address, of the dtype of weights.DTYPE_CODES, as float32; zeros outside the mask."""
    if code == 0:
        values = tl.load(address.to(tl.pointer_type(tl.float32)) + offsets, mask=mask, other=0.0)
    elif code == 1:
        values = tl.load(address.to(tl.pointer_type(tl.bfloat16)) + offsets, mask=mask, other=0.0).to(tl.float32)
    else:
        values = tl.load(address.to(tl.pointer_type(tl.float16)) + offsets, mask=mask, other=0.0).to(tl.float32)
    return values


@triton.jit
def _shrink(
    x, table, h, token_indices, pair_adapters,
    inside, count, x_row, x_column,
    W: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """h[p, k] = A_a x[t] over the features of piece p, k = (t, a); R of the W ranks."""
    k, piece = tl.program_id(0), tl.program_id(1)
    row = table + tl.load(pair_adapters + k) * 4
    r, code = tl.load(row + 2), tl.load(row + 3)
    if tl.program_id(2) * R < r:
        ranks = tl.program_id(2) * R + tl.arange(0, R)
        x += tl.load(token_indices + k) * x_row  # the indices are of 64 bits, and so are the products
        total = tl.zeros((R,), tl.float32)
        for begin in range(0, PIECE, BLOCK):
            features = piece * PIECE + begin + tl.arange(0, BLOCK)
            inner = features < inside
            values = tl.load(x + features * x_column, mask=inner, other=0.0).to(tl.float32)
            mask = inner[:, None] & (ranks < r)[None, :]
            offsets = ranks.to(tl.int64)[None, :] * inside + features[:, None]
            total += tl.sum(values[:, None] * _load(tl.load(row), offsets, mask, code), axis=0)
        tl.store(h + (piece * count + k).to(tl.int64) * W + ranks, total)


@triton.jit
def _expand(
    h, table, scaling, z, starts, order, pair_adapters, weights,
    outside, count, pieces, z_row, z_column,
    W: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """z[t] += Σ_{k of t} w_k · scaling_a · B_a Σ_p h[p, k], BLOCK features of it."""
    t = tl.program_id(0).to(tl.int64)
    start, stop = tl.load(starts + t), tl.load(starts + t + 1)
    if start < stop:  # a row of the base alone stays as it is, bit for bit
        features = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inner = features < outside
        total = tl.zeros((BLOCK,), tl.float32)
        for i in range(start, stop):
            k = tl.load(order + i)
            adapter = tl.load(pair_adapters + k)
            row = table + adapter * 4
            b, r, code = tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
            factor = tl.load(weights + k) * tl.load(scaling + adapter)
            for begin in range(0, W, R):
                ranks = begin + tl.arange(0, R)
                used = ranks < r  # the rest of h is not written
                shrunk = tl.zeros((R,), tl.float32)
                for piece in range(pieces):
                    shrunk += tl.load(h + (piece * count + k) * W + ranks, mask=used, other=0.0)
                offsets = features.to(tl.int64)[None, :] * r + ranks[:, None]
                values = _load(b, offsets, used[:, None] & inner[None, :], code)
                total += tl.sum((shrunk * factor)[:, None] * values, axis=0)
        places = z + t * z_row + features * z_column
        before = tl.load(places, mask=inner, other=0.0).to(tl.float32)
        tl.store(places, (before + total).to(z.dtype.element_ty), mask=inner)
