"""A linear layer that does not train, so that its weight may lie as its kernel likes. Knows autograd, no format."""

from typing import Any

import torch
from torch import Tensor, nn

from loradeck.base.matmul import back
from loradeck.errors import UnsupportedError


class FrozenLinear(nn.Linear):
    """An nn.Linear in all but its weight's format. Gradients go through it to its input, never into it."""

    def dense(self) -> Tensor:
        """Return the weight it computes with, (out, in), as nn.Linear would hold it."""
        raise NotImplementedError

    def product(self, x: Tensor) -> Tensor:
        """X Wᵀ + bias, unknown to autograd: x (…, in) of the layer's dtype -> (…, out)."""
        raise NotImplementedError

    def back(self, grad: Tensor) -> Tensor:
        """Return `product`'s gradient: dL/dy (…, out) -> dL/dx (…, in), in its dtype."""
        return back(grad, self.dense())

    def forward(self, input: Tensor) -> Tensor:
        """As nn.Linear: (…, in) -> (…, out)."""
        if torch.is_grad_enabled() and (input.requires_grad or self.weight.requires_grad):
            if self.weight.requires_grad:
                raise UnsupportedError(
                    "the weights of this base are packed or quantised, and cannot be trained",
                    hint="Train adapters, or load the base with weights='plain'.",
                )
            return _Through.apply(input, self)
        return self.product(input)


class _Through(torch.autograd.Function):
    """y = x Wᵀ + bias and dx = dy W, where W is made dense for as long as the product takes."""

    @staticmethod
    # pyrefly: ignore [bad-override]  (torch declares any arguments)
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return layer.product(x)

    @staticmethod
    # pyrefly: ignore [bad-override]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.back(grad).to(ctx.dtype), None
