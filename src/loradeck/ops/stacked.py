"""Few rows of many adapters as two batched products. Best at a decode step; for linear layers, outside autograd.

A row meets its own adapter's slot and no other, so a neighbour that is not finite stays where it is, whatever it is.
"""

import threading

import torch
from torch import Tensor

from loradeck.ops.mapping import Mix
from loradeck.ops.operands import Operands
from loradeck.ops.plan import Plan, Stripe, plan_of


def lora(x: Tensor, y: Tensor, operands: Operands, mix: Mix, plan: Plan | None = None) -> Tensor:
    """H[s] = X[s] A[s];  y[put] += (weight · H[s] B[s])  for each slot s of each stripe.

    x the layer's input · y the base's output for it, which is updated -> y. The plan's groups are left to others.
    """
    form = operands.form
    items, z = form.items(x), form.positions(y)
    plan = plan or plan_of(mix, operands.slots, items.shape[0] // mix.total, items.device)
    for stripe in plan.stripes:
        a, b = operands.stack(stripe.width, x, stripe.first, stripe.slots)
        h = torch.bmm(_rows(x, items, stripe, a.dtype), a)
        if stripe.weight is not None:
            h.mul_(stripe.weight)
        update = torch.bmm(h, b).view(-1, z.shape[1]).to(z.dtype)
        if stripe.back is not None:
            z.add_(update.index_select(0, stripe.back))
        else:
            rows = update if stripe.places is None else update.index_select(0, stripe.places)
            z.index_add_(0, stripe.put, rows)
    return form.restore(z, y)


class _Last(threading.local):
    """The rows that this thread gathered last: layers that share an input share them."""

    source: tuple[Tensor, int, Stripe, torch.dtype] | None = None
    rows: Tensor


_last = _Last()


def _rows(x: Tensor, items: Tensor, stripe: Stripe, dtype: torch.dtype) -> Tensor:
    """Return the rows of a layer's input that meet each slot, (S, M, I)."""
    if x.is_inference():  # nothing would tell that it was written to since
        return _gathered(items, stripe, dtype)
    last = _last.source
    if last is None or last[0] is not x or last[1:] != (x._version, stripe, dtype):
        _last.rows = _gathered(items, stripe, dtype)
        _last.source = (x, x._version, stripe, dtype)
    return _last.rows


def _gathered(items: Tensor, stripe: Stripe, dtype: torch.dtype) -> Tensor:
    return items.index_select(0, stripe.take).to(dtype).view(stripe.slots, -1, items.shape[1])
