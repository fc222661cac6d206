"""A linear layer's update as one node of autograd, for training.

n tokens of a segment, r rank. For each adapter, with f = w · scaling · (dropout's scale), x̃ the segment's x with zeros
where inputs are dropped, and g = dL/dy:

    h = x̃ Aᵀ (n, r)    y += f h Bᵀ
    dh = g B (n, r)    dA = f dhᵀ x̃    dB = f gᵀ h    dx += f dh A, with zeros where inputs were dropped
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from loradeck.ops.dropout import Dropout, dropped
from loradeck.ops.segments import Segment, Segments, add, take
from loradeck.ops.weights import LayerAdapters, compute_dtype, in_range


def in_backward() -> bool:
    """Whether this thread runs a backward pass; a layer called there is computed again (gradient checkpointing)."""
    return torch._C._current_graph_task_id() != -1


@dataclass(frozen=True, slots=True)
class Term:
    """One adapter's update, without its tensors A and B."""

    segment: Segment
    factor: float
    dropout: Dropout | None
    path: str

    def weighted(self, tensor: Tensor) -> Tensor:
        """Multiply rows by the weights of their tokens, where these differ; one weight for all is in `factor`."""
        weight = self.segment.weight
        return tensor * weight.to(tensor.dtype) if isinstance(weight, Tensor) else tensor


def lora(x: Tensor, y: Tensor, adapters: LayerAdapters, segments: Segments, *, training: bool = False) -> Tensor:
    """y[s] + w · scaling_a · B_a (A_a dropout_a(x[s])) for each segment s, of adapter a.

    x the layer's input (…, in) · y the base's output for it (…, out), not written to -> a tensor like y. Dropout acts
    only when `training`. Saves x as it is, h, and masks of a byte per element for the backward pass.
    """
    dtype = compute_dtype(x, y)
    terms: list[Term] = []
    leaves: list[Tensor] = []
    for segment in segments.all:
        weights = adapters.weights[segment.adapter]
        if weights is not None:
            dropout = weights.dropout if training else None
            factor = weights.scaling * (dropout.scale if dropout else 1.0)
            if not isinstance(segment.weight, Tensor):
                factor *= segment.weight
            terms.append(Term(segment, in_range(factor, dtype), dropout, weights.path))
            leaves += weights.a, weights.b
    return _Update.apply(x, y, terms, *leaves) if terms else y


class _Update(torch.autograd.Function):
    @staticmethod
    # pyrefly: ignore [bad-override]  (torch declares any arguments)
    def forward(ctx: Any, x: Tensor, y: Tensor, terms: list[Term], *leaves: Tensor) -> Tensor:
        # A copy of y: a hook or a saved tensor may still hold the base's output. No view: models add to it in place.
        new = y.clone(memory_format=torch.contiguous_format)
        z = new.view(-1, y.shape[-1])
        items, dtype = x.reshape(-1, x.shape[-1]), compute_dtype(x, y)
        saved: list[Tensor | None] = []
        with torch.autocast(x.device.type, enabled=False):
            for term, a, b in zip(terms, leaves[::2], leaves[1::2], strict=True):
                rows = term.segment.rows
                x_rows = take(items, rows).to(dtype)
                keep = term.dropout.keep(x_rows.shape, term.path, x.device) if term.dropout else None
                h = F.linear(dropped(x_rows, keep), a.to(dtype))
                add(z, rows, term.weighted(h), b.to(dtype).t(), factor=term.factor)
                saved += a, b, h, keep
        ctx.terms, ctx.dtype, ctx.shape = terms, dtype, x.shape
        ctx.save_for_backward(x if any(ctx.needs_input_grad[3:]) else None, *saved)
        return new

    @staticmethod
    # pyrefly: ignore [bad-override]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Made of differentiable operations, so that the gradients can be differentiated too."""
        x, *saved = ctx.saved_tensors
        needs_x, needs_y, _, *needs = ctx.needs_input_grad
        g, dtype = grad.reshape(-1, grad.shape[-1]), ctx.dtype
        dx = g.new_zeros((g.shape[0], ctx.shape[-1]), dtype=dtype) if needs_x else None
        grads: list[Tensor | None] = []
        with torch.autocast(g.device.type, enabled=False):
            for i, term in enumerate(ctx.terms):
                a, b, h, keep = saved[4 * i : 4 * i + 4]
                needs_a, needs_b = needs[2 * i : 2 * i + 2]
                rows = term.segment.rows
                g_rows, a, b = term.weighted(take(g, rows).to(dtype)), a.to(dtype), b.to(dtype)
                dh = g_rows @ b
                da = db = None
                if x is not None and (needs_a or torch.is_grad_enabled()):
                    x_rows = dropped(take(x.reshape(-1, x.shape[-1]), rows).to(dtype), keep)
                    if needs_a:
                        da = torch.addmm(a, dh.t(), x_rows, beta=0, alpha=term.factor)
                    if torch.is_grad_enabled():
                        h = F.linear(x_rows, a)  # the saved one has no history to differentiate
                if needs_b:
                    db = torch.addmm(b, g_rows.t(), h, beta=0, alpha=term.factor)
                grads += da, db
                if dx is not None:
                    add(dx, rows, dh, a, factor=term.factor, keep=keep)
        return None if dx is None else dx.view(ctx.shape), grad if needs_y else None, None, *grads
