"""Groups with many rows as two dense products, all their adapters side by side along the rank, a mask between.

In half precision a small product takes longer to begin than to compute, so that two large ones with some arithmetic for
nothing take half the time of two for each group. For linear layers, outside autograd, where every pair is finite:
0 · NaN is NaN, and would reach every row.

T items   R ranks of all the groups' adapters
"""

import threading
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from loradeck.ops.mapping import Group, Mix
from loradeck.ops.operands import Operands, compute_dtype

Use = tuple[int, int, float]  # (operand, its rank, its scaling)


def lora(x: Tensor, y: Tensor, operands: Operands, mix: Mix, groups: Sequence[Group] | None = None) -> Tensor:
    """H = X Aᵀ;  H = where(used, H · factor, 0);  y += H Bᵀ, for these groups' adapters, by default all of the mix.

    x the layer's input · y the base's output for it, which is updated -> y.
    """
    form, dtype = operands.form, compute_dtype(x, y)
    groups = mix.groups if groups is None else groups
    pairs = {operand: operands.pair(operand, dtype) for group in groups for operand, _ in group.entry}
    own = {operand: pair for operand, pair in pairs.items() if pair is not None}
    if not own:
        return y
    items, z = form.items(x).to(dtype), form.positions(y)
    uses = tuple((operand, pair.r, pair.scaling) for operand, pair in own.items())
    factors, unused = _mask(mix, groups, uses, items)
    h = F.linear(items, torch.cat([pair.a for pair in own.values()]))  # (T, R)
    h.mul_(factors).masked_fill_(unused, 0.0)  # an overflow next door is Inf, and Inf · 0 is NaN
    b = torch.cat([pair.b.t() for pair in own.values()])
    if z.dtype == dtype:
        z.addmm_(h, b)
    else:
        z.add_(h @ b)
    return form.restore(z, y)


class _Last(threading.local):
    """The mask that this thread made last: the layers of a step have the same."""

    source: tuple[Mix, Sequence[Group], tuple[Use, ...], int, torch.dtype, torch.device] | None = None
    mask: tuple[Tensor, Tensor]


_last = _Last()


def _mask(mix: Mix, groups: Sequence[Group], uses: tuple[Use, ...], items: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factor weight · scaling of each item and rank (T, R), and where it is none."""
    source = (mix, groups, uses, len(items), items.dtype, items.device)
    last = _last.source
    if last is None or last[0] is not mix or last[1] is not groups or last[2:] != source[2:]:
        unit = len(items) // mix.total
        spans: dict[int, tuple[int, int, float]] = {}
        start = 0
        for operand, r, scaling in uses:
            spans[operand] = start, start + r, scaling
            start += r
        factors = torch.zeros(len(items), start, dtype=items.dtype)
        for group in groups:
            rows = group.rows(unit, factors.device)
            for operand, weight in group.entry:
                if operand in spans:
                    first, stop, scaling = spans[operand]
                    factors[rows, first:stop] += weight * scaling
        factors = factors.to(items.device)
        _last.mask = factors, factors == 0
        _last.source = source
    return _last.mask
