"""Few rows of many adapters as two Triton kernels on a GPU: what `stacked` computes. Knows linear layers only.

A row reads its own slots and no other, so a neighbour that is not finite stays where it is, whatever it is. Only
`choose` imports this, where the package triton is; torch's builds for CUDA bring it.

T items   K meetings of an item with a slot   P pieces of I   S slots   W ranks   I features in   O features out
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from loradeck.ops import reference
from loradeck.ops.layer_kinds import LinearForm
from loradeck.ops.mapping import Mix
from loradeck.ops.operands import Operands
from loradeck.ops.plan import Plan, Stripe, plan_of
from loradeck.ops.weights import Pair

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # float64 would lose what float32 sums cannot hold
PIECE = 1024  # features in that one program reads; few rows alone would leave most of a GPU idle
TILE = 4096  # numbers of a matrix that a program holds at once
RANKS = 64  # of these at most


def lora(x: Tensor, y: Tensor, operands: Operands, mix: Mix, plan: Plan | None = None) -> Tensor:
    """H[k] = x[item_k] A[slot_k];  y[t] += Σ_{k of t} weight_k · H[k] B[slot_k], for each stripe; sums in float32.

    x the layer's input · y the base's output for it, which is updated -> y. The plan's groups are left to others.
    """
    form = operands.form
    items, z = form.items(x), form.positions(y)
    plan = plan or plan_of(mix, operands.slots, items.shape[0] // mix.total, items.device)
    with torch.cuda.device_of(z):  # Triton launches on the current device, whatever device the tensors are on
        for stripe in plan.stripes:
            a, b = operands.stack(stripe.width, x, stripe.first, stripe.slots)
            _update(items, z, a, b, _meetings(stripe, len(items)))
    return form.restore(z, y)


def problem(device: torch.device) -> str:
    """Try the kernels on a few rows there against the definition, and return why not to use them; "" if nothing is."""
    chance = torch.Generator().manual_seed(0)
    x, y, a, b = (torch.randn(shape, generator=chance) for shape in ((6, 48), (6, 40), (8, 48), (40, 8)))
    pairs = [Pair(a[:r], b[:, -r:], 0.2) for r in (5, 6, 7, 8)]
    mix = Mix((*(((i, 1.0),) for i in range(4)), (), ((1, -0.5), (0, 2.0))), (1,) * 6)
    form, moved = LinearForm(48, 40), [Pair(own.a.to(device), own.b.to(device), own.scaling) for own in pairs]
    try:
        with torch.no_grad():
            expected = reference.lora(x, y, Operands(form, tuple(pairs)), mix)
            found = lora(x.to(device), y.to(device), Operands(form, tuple(moved)), mix).cpu()
    except Exception as error:  # a compiler that is missing, or refuses this device, says so in no common way
        return f"is not to be had here ({str(error).partition(chr(10))[0][:100] or type(error).__name__})"
    off = float((found - expected).abs().max())
    return "" if off <= 1e-3 else f"is off by {off:.1e} here"


@dataclass(frozen=True, slots=True)
class Meetings:
    """Which slots an item meets, at which weights: those of item t are first[t] to first[t + 1] - 1."""

    first: Tensor
    """(T + 1)"""
    item: Tensor
    """(K), ascending; so are `slot` and `weight` of this order."""
    slot: Tensor
    weight: Tensor
    """(K), float32."""


@lru_cache(maxsize=64)  # a stripe is the same for all layers, and lives as long as its mix: the steps of a decode
def _meetings(stripe: Stripe, count: int) -> Meetings:
    item, order = stripe.put.sort(stable=True)
    place = order if stripe.places is None else stripe.places[order]
    rows = len(stripe.take) // stripe.slots
    weight = torch.ones_like(place, dtype=torch.float32) if stripe.weight is None else stripe.weight.view(-1)[place]
    first = torch.searchsorted(item, torch.arange(count + 1, device=item.device))
    return Meetings(first, item, place // rows, weight)


def _update(items: Tensor, z: Tensor, a: Tensor, b: Tensor, meetings: Meetings) -> None:
    """z[t] += Σ_{k of t} weight_k · (items[t] A[slot_k]) B[slot_k], z (T, O), A (S, I, W), B (S, W, O)."""
    count, (_, inside, width), outside = len(meetings.item), a.shape, b.shape[2]
    pieces, ranks = triton.cdiv(inside, PIECE), min(width, RANKS)
    h = torch.empty(pieces, count, width, dtype=torch.float32, device=z.device)
    _shrink[(count, pieces, width // ranks)](
        items, a, h, meetings.item, meetings.slot,
        inside, count, items.stride(0), items.stride(1), a.stride(0), a.stride(1),
        W=width, R=ranks, BLOCK=TILE // ranks, PIECE=PIECE,
    )  # fmt: skip
    block = min(TILE // ranks, triton.next_power_of_2(outside))
    _expand[(len(z), triton.cdiv(outside, block))](
        h, b, z, meetings.first, meetings.slot, meetings.weight,
        outside, count, pieces, b.stride(0), b.stride(1), z.stride(0), z.stride(1),
        W=width, R=ranks, BLOCK=block,
    )  # fmt: skip


@triton.jit
def _shrink(
    x, a, h, item, slot,
    inside, count, x_row, x_column, a_slot, a_row,
    W: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """h[p, k] = x[item_k] A[slot_k] over the features of piece p; R of the W ranks."""
    k, piece = tl.program_id(0), tl.program_id(1)
    ranks = tl.program_id(2) * R + tl.arange(0, R)
    x += tl.load(item + k) * x_row  # the indices are of 64 bits, and so are the products
    a += tl.load(slot + k) * a_slot
    total = tl.zeros((R,), tl.float32)
    for begin in range(0, PIECE, BLOCK):
        features = piece * PIECE + begin + tl.arange(0, BLOCK)
        inner = features < inside
        own = tl.load(x + features * x_column, mask=inner, other=0.0).to(tl.float32)
        tile = tl.load(a + features[:, None] * a_row + ranks[None, :], mask=inner[:, None], other=0.0).to(tl.float32)
        total += tl.sum(own[:, None] * tile, axis=0)
    tl.store(h + (piece * count + k).to(tl.int64) * W + ranks, total)


@triton.jit
def _expand(
    h, b, z, first, slot, weight,
    outside, count, pieces, b_slot, b_row, z_row, z_column,
    W: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """z[t] += Σ_{k of t} weight_k · Σ_p h[p, k] B[slot_k], BLOCK features of it."""
    t = tl.program_id(0).to(tl.int64)
    start, stop = tl.load(first + t), tl.load(first + t + 1)
    if start < stop:  # a row of the base alone stays as it is, bit for bit
        features = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inner = features < outside
        total = tl.zeros((BLOCK,), tl.float32)
        for k in range(start, stop):
            own = b + tl.load(slot + k) * b_slot
            factor = tl.load(weight + k)
            for begin in range(0, W, R):
                ranks = begin + tl.arange(0, R)
                shrunk = tl.zeros((R,), tl.float32)
                for piece in range(pieces):
                    shrunk += tl.load(h + (piece * count + k) * W + ranks)
                places = own + ranks[:, None] * b_row + features[None, :]
                tile = tl.load(places, mask=inner[None, :], other=0.0).to(tl.float32)
                total += tl.sum((shrunk * factor)[:, None] * tile, axis=0)
        places = z + t * z_row + features * z_column
        before = tl.load(places, mask=inner, other=0.0).to(tl.float32)
        tl.store(places, (before + total).to(z.dtype.element_ty), mask=inner)
