"""Layers whose weights are kept in 8 bits: one scale per output, no zero point. Knows torch's private op for them.

w[o, i] ≈ s[o] q[o, i], q whole numbers from -127 to 127, s[o] = max_i |w[o, i]| / 127 rounded to bfloat16
"""

from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loradeck.base.frozen import FrozenLinear
from loradeck.base.matmul import blocks, linear
from loradeck.base.self_check import Product, self_check
from loradeck.errors import UnsupportedError

FEW = 8  # rows up to which the op is faster than making the weight plain first: `python -m benchmarks.kernels`
STEP = 32  # the op crashes where the inputs are no multiple of 16, and a wider step costs nothing
TOLERANCE = 2**-6  # of the largest output: the op rounds its inputs and outputs to bfloat16


class Unsaved(nn.Module):
    """Goes into no state_dict and takes nothing from one: whole numbers would be taken for weights, or the reverse."""

    def _save_to_state_dict(self, *_: Any, **__: Any) -> None:
        raise UnsupportedError(
            "this base was quantised to int8 at load; its weights are neither saved nor replaced",
            hint="Load it with weights='plain' for that.",
        )

    _load_from_state_dict = _save_to_state_dict


class QuantisedLinear(Unsaved, FrozenLinear):
    """An nn.Linear with `weight` in int8 (out, in) and `scales` (out,) in the dtype it computes in."""

    scales: nn.Parameter

    def dense(self) -> Tensor:
        return self.weight.to(self.scales.dtype) * self.scales[:, None]

    def product(self, x: Tensor) -> Tensor:
        items = x.reshape(-1, self.in_features)
        if 0 < len(items) <= FEW and self.in_features % STEP == 0 and x.device.type == "cpu" and not int8_product():
            y = _few(items, self.weight, self.scales)
        else:
            y = _many(items, self.weight, self.scales)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


class QuantisedEmbedding(Unsaved, nn.Embedding):
    """An nn.Embedding with `weight` in int8 (number, dim) and `scales` (number,); a scaled one (Gemma) stays scaled."""

    scales: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:
        """Whole numbers of any shape (…) -> (…, dim)."""
        y = F.embedding(input, self.weight).to(self.scales.dtype) * self.scales[input][..., None]
        scale = getattr(self, "embed_scale", None)
        return y if scale is None else y * torch.as_tensor(scale, dtype=y.dtype, device=y.device)


def quantised(weight: Tensor) -> tuple[nn.Parameter, nn.Parameter]:
    """Return q (out, in) in int8 and s (out,) in the weight's dtype, so that |w - s q| is at most s / 2."""
    q, scales = torch.empty_like(weight, dtype=torch.int8), weight.new_empty(len(weight))
    for rows in blocks(weight):
        own = weight[rows].detach().float()
        scales[rows] = (own.abs().amax(1) / 127).to(torch.bfloat16).to(weight.dtype)
        q[rows] = (own / scales[rows, None].float().clamp_min(1e-30)).round_().clamp_(-127, 127).to(torch.int8)
    return nn.Parameter(q, requires_grad=False), nn.Parameter(scales, requires_grad=False)


@cache
def int8_product() -> str:
    """Return why torch's product of bfloat16 rows with int8 weights is not used; "" where it is. Tried once."""
    return self_check(_pair, torch.bfloat16, TOLERANCE)


def _few(items: Tensor, q: Tensor, scales: Tensor) -> Tensor:
    """(x qᵀ) s for few rows, in bfloat16: items (rows, in) -> (rows, out) in their dtype."""
    half = torch.bfloat16
    y = torch.ops.aten._weight_int8pack_mm.default(items.to(half).contiguous(), q, scales.to(half))
    return y.to(items.dtype)


def _many(items: Tensor, q: Tensor, scales: Tensor) -> Tensor:
    """(x qᵀ) s with q made plain a block at a time; bfloat16 holds every whole number up to 256."""
    y = items.new_empty(len(items), len(q))
    for rows in blocks(q):
        torch.mul(linear(items, q[rows].to(items.dtype)), scales[rows], out=y[:, rows])
    return y


def _pair(weight: Tensor) -> tuple[Product, Product]:
    q, scales = quantised(weight)
    return partial(_few, q=q, scales=scales), partial(_many, q=q, scales=scales)
