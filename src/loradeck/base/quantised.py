"""Layers with int8 weights: symmetric, one scale per output (torch's private int8 op).

w[o, i] ≈ s[o] q[o, i], q integers in [-127, 127], s[o] = max_i |w[o, i]| / 127 rounded to bfloat16
"""

from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loradeck.base.frozen import FrozenLinear
from loradeck.base.matmul import blocks, linear
from loradeck.base.self_check import Product, why_not_usable
from loradeck.errors import UnsupportedError

FEW = 8  # rows up to which the op is faster than dequantising first: `python -m benchmarks base`
STEP = 32  # the op crashes unless the inputs are a multiple of 16; asking for 32 costs nothing
TOLERANCE = 2**-6  # share of the largest output: the op rounds its inputs and outputs to bfloat16


class _NoStateDict(nn.Module):
    """Neither saves nor loads a state_dict: integers would be taken for weights, or weights for integers."""

    def _save_to_state_dict(self, *_: Any, **__: Any) -> None:
        raise UnsupportedError(
            "the weights of a base loaded in int8 can be neither saved nor replaced",
            hint="Load the base with plain weights.",
        )

    _load_from_state_dict = _save_to_state_dict


class QuantisedLinear(_NoStateDict, FrozenLinear):
    """An nn.Linear with `weight` in int8 (out, in) and `scales` (out,) in the dtype it computes in."""

    scales: nn.Parameter

    def dense(self) -> Tensor:
        return self.weight.to(self.scales.dtype) * self.scales[:, None]

    def product(self, x: Tensor) -> Tensor:
        items = x.reshape(-1, self.in_features)
        fits = 0 < len(items) <= FEW and self.in_features % STEP == 0 and x.device.type == "cpu"
        if fits and x.dtype != torch.float32 and why_not_int8_product() is None:
            y = _few(items, self.weight, self.scales)
        else:
            y = _many(items, self.weight, self.scales)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


class QuantisedEmbedding(_NoStateDict, nn.Embedding):
    """An nn.Embedding with `weight` in int8 (number, dim) and `scales` (number,); a scaled one (Gemma) stays scaled."""

    scales: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:
        """Token ids (…) -> (…, dim)."""
        y = F.embedding(input, self.weight).to(self.scales.dtype) * self.scales[input][..., None]
        scale = getattr(self, "embed_scale", None)
        return y if scale is None else y * torch.as_tensor(scale, dtype=y.dtype, device=y.device)


def quantise(weight: Tensor) -> tuple[nn.Parameter, nn.Parameter]:
    """Return q (out, in) in int8 and s (out,) in the weight's dtype, with |w - s q| <= s / 2."""
    q, scales = torch.empty_like(weight, dtype=torch.int8), weight.new_empty(len(weight))
    for rows in blocks(weight):
        block = weight[rows].detach().float()
        scales[rows] = (block.abs().amax(1) / 127).to(torch.bfloat16).to(weight.dtype)
        q[rows] = (block / scales[rows, None].float().clamp_min(1e-30)).round_().clamp_(-127, 127).to(torch.int8)
    return nn.Parameter(q, requires_grad=False), nn.Parameter(scales, requires_grad=False)


@cache
def why_not_int8_product() -> str | None:
    """Return why torch's product with int8 weights is not used on this machine, or None if it is. Checked once."""
    return why_not_usable(_products, torch.bfloat16, TOLERANCE)


def _few(items: Tensor, q: Tensor, scales: Tensor) -> Tensor:
    """(x qᵀ) s for few rows, in bfloat16: items (rows, in) -> (rows, out) in their dtype."""
    half = torch.bfloat16
    y = torch.ops.aten._weight_int8pack_mm.default(items.to(half).contiguous(), q, scales.to(half))
    return y.to(items.dtype)


def _many(items: Tensor, q: Tensor, scales: Tensor) -> Tensor:
    """(x qᵀ) s with q converted a block at a time; bfloat16 holds every integer up to 256."""
    y = items.new_empty(len(items), len(q))
    for rows in blocks(q):
        torch.mul(linear(items, q[rows].to(items.dtype)), scales[rows], out=y[:, rows])
    return y


def _products(weight: Tensor) -> tuple[Product, Product]:
    q, scales = quantise(weight)
    return partial(_few, q=q, scales=scales), partial(_many, q=q, scales=scales)
