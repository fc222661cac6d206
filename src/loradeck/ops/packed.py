"""Any mix as two dense products with a mask between them. Best when rows are short: one decode step."""

import torch
import torch.nn.functional as F
from torch import Tensor

from loradeck.ops.mix import Mix
from loradeck.ops.operands import Operands, compute_dtype
from loradeck.ops.pair import Pack


def lora(x: Tensor, y: Tensor, operands: Operands, mix: Mix, pack: Pack | None = None) -> Tensor:
    """h = x Aᵀ;  h = where(used, h · factor, 0);  y + h Bᵀ.

    x the layer's input · y the base's output for it -> a tensor like y (y itself, updated, outside autograd).
    Every pair must be finite: 0 · NaN is NaN, so a neighbour's would reach every row.
    """
    form = operands.form
    if pack is None:
        pack = operands.pack(compute_dtype(x, y))
    items = form.items(x)
    h = form.shrink(items.to(pack.a.dtype) if items.is_floating_point() else items, pack.a)  # (T, R)
    factors, factor = mix.mask(operands.spans, operands.width, operands.scalings, h.dtype, h.device)
    runs = h.view(mix.total, -1, h.shape[1])
    if factor is None:
        # A product alone would leak: an overflow in a neighbour's rank is inf, and inf · 0 is NaN.
        runs.mul_(factors).masked_fill_(factors == 0, 0.0)
    else:
        runs.masked_fill_(factors, 0.0)
    z = form.positions(y)
    alpha = 1.0 if factor is None else factor
    if z.dtype == h.dtype == pack.b.dtype:
        if torch.is_grad_enabled():
            return form.restore(torch.addmm(z, h, pack.b.T, alpha=alpha), y)
        return form.restore(z.addmm_(h, pack.b.T, alpha=alpha), y)
    if torch.is_grad_enabled():
        return form.restore(torch.add(z, F.linear(h, pack.b), alpha=alpha).to(z.dtype), y)
    return form.restore(z.add_(F.linear(h, pack.b), alpha=alpha), y)
