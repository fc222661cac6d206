"""A linear layer's update as one node of autograd: the way of training. Knows linear layers only.

G tokens of a group, r rank. For each pair on each group, with f = w · scaling · (what dropout scales by), x̃ the
group's x without what is dropped, and g = dL/dy:

    h = x̃ Aᵀ (G, r)    y += f h Bᵀ
    dh = g B (G, r)    dA = f dhᵀ x̃    dB = f gᵀ h    dx += f dh A, without what is dropped
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from loradeck.ops.dropout import Dropout, dropped
from loradeck.ops.mapping import Group, Mix, add, take
from loradeck.ops.operands import Operands, compute_dtype


@dataclass(frozen=True, slots=True)
class Term:
    """One pair on one group: all but its tensors."""

    group: Group
    factor: float
    dropout: Dropout | None
    place: str


def lora(x: Tensor, y: Tensor, operands: Operands, mix: Mix, *, training: bool = False) -> Tensor:
    """y[g] + Σ_a w_a · scaling_a · B_a (A_a dropout_a(x[g])) for each group g of rows.

    x the layer's input (…, in) · y the base's output for it (…, out), left as it is -> a tensor like y. Dropout acts
    only when `training`. For the backward pass it keeps x as it came, h, and masks of a byte per element.
    """
    terms: list[Term] = []
    leaves: list[Tensor] = []
    for group in mix.groups:
        for operand, weight in group.entry:
            pair = operands.pairs[operand]
            if pair is not None:
                dropout = pair.dropout if training else None
                factor = weight * pair.scaling * (dropout.scale if dropout else 1.0)
                terms.append(Term(group, factor, dropout, pair.place))
                leaves += pair.a, pair.b
    return _Update.apply(x, y, mix.total, terms, *leaves) if terms else y


class _Update(torch.autograd.Function):
    @staticmethod
    # pyrefly: ignore [bad-override]  (torch declares any arguments)
    def forward(ctx: Any, x: Tensor, y: Tensor, total: int, terms: list[Term], *leaves: Tensor) -> Tensor:
        # A copy of y: what else holds the base's output (a hook, a saved tensor) is not known here.
        z = y.reshape(-1, y.shape[-1]).clone(memory_format=torch.contiguous_format)
        items, dtype = x.reshape(-1, x.shape[-1]), compute_dtype(x, y)
        unit = items.shape[0] // total
        saved: list[Tensor | None] = []
        with torch.autocast(x.device.type, enabled=False):
            for term, a, b in zip(terms, leaves[::2], leaves[1::2], strict=True):
                rows = term.group.rows(unit, x.device)
                own = take(items, rows).to(dtype)
                keep = term.dropout.keep(own.shape, term.place, x.device) if term.dropout else None
                h = F.linear(dropped(own, keep), a.to(dtype))
                add(z, rows, h, b.to(dtype).t(), factor=term.factor)
                saved += a, b, h, keep
        ctx.terms, ctx.unit, ctx.dtype, ctx.shape = terms, unit, dtype, x.shape
        ctx.save_for_backward(x if any(ctx.needs_input_grad[4:]) else None, *saved)
        return z.view(y.shape)

    @staticmethod
    # pyrefly: ignore [bad-override]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Made of operations that can be differentiated, so that the gradients can be, too."""
        x, *saved = ctx.saved_tensors
        needs_x, needs_y, _, _, *needs = ctx.needs_input_grad
        g, dtype = grad.reshape(-1, grad.shape[-1]), ctx.dtype
        dx = g.new_zeros((g.shape[0], ctx.shape[-1]), dtype=dtype) if needs_x else None
        grads: list[Tensor | None] = []
        with torch.autocast(g.device.type, enabled=False):
            for i, term in enumerate(ctx.terms):
                a, b, h, keep = saved[4 * i : 4 * i + 4]
                needs_a, needs_b = needs[2 * i : 2 * i + 2]
                rows = term.group.rows(ctx.unit, g.device)
                own_g, a, b = take(g, rows).to(dtype), a.to(dtype), b.to(dtype)
                dh = own_g @ b
                da = db = None
                if x is not None and (needs_a or torch.is_grad_enabled()):
                    own = dropped(take(x.reshape(-1, x.shape[-1]), rows).to(dtype), keep)
                    if needs_a:
                        da = torch.addmm(a, dh.t(), own, beta=0, alpha=term.factor)
                    if torch.is_grad_enabled():
                        h = F.linear(own, a)  # the saved one has no history to differentiate
                if needs_b:
                    db = torch.addmm(b, own_g.t(), h, beta=0, alpha=term.factor)
                grads += da, db
                if dx is not None:
                    add(dx, rows, dh, a, factor=term.factor, keep=keep)
        return None if dx is None else dx.view(ctx.shape), grad if needs_y else None, None, None, *grads
