"""Few rows of many adapters as two batched products. Best at a decode step; for linear layers, outside autograd.

A row meets its own adapter's slot and no other, so a neighbour that is not finite stays where it is, whatever it is.
"""

import torch
from torch import Tensor

from loradeck.ops.mix import Mix
from loradeck.ops.operands import Operands
from loradeck.ops.plan import Plan, plan_of


def lora(x: Tensor, y: Tensor, operands: Operands, mix: Mix, plan: Plan | None = None) -> Tensor:
    """H[s] = X[s] A[s];  y[put] += (weight · H[s] B[s])  for each slot s of each stripe.

    x the layer's input · y the base's output for it, which is updated -> y. The plan's groups are left to others.
    """
    form = operands.form
    items, z = form.items(x), form.positions(y)
    plan = plan or plan_of(mix, operands.slots, items.shape[0] // mix.total, items.device)
    for stripe in plan.stripes:
        a, b = operands.stack(stripe.width, x)
        own = items.index_select(0, stripe.take).to(a.dtype).view(stripe.slots, -1, items.shape[1])
        h = torch.bmm(own, a[: stripe.slots])
        if stripe.weight is not None:
            h.mul_(stripe.weight)
        update = torch.bmm(h, b[: stripe.slots]).view(-1, z.shape[1])
        if stripe.back is not None:
            z.add_(update.index_select(0, stripe.back))
        else:
            rows = update if stripe.places is None else update.index_select(0, stripe.places)
            z.index_add_(0, stripe.put, rows.to(z.dtype))
    return form.restore(z, y)
