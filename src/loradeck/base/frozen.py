"""Layers that are never trained, so their weights may have any format."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from loradeck.base.matmul import input_grad, linear
from loradeck.dtypes import computes_in
from loradeck.errors import UnsupportedError


class FrozenLinear(nn.Linear):
    """An nn.Linear whose weight has a format of its own. Gradients flow to its input, never to its weight."""

    def dense(self) -> Tensor:
        """Return the weight as nn.Linear holds it: (out, in), in the dtype the layer computes in."""
        raise NotImplementedError

    def product(self, x: Tensor) -> Tensor:
        """X Wᵀ + bias without autograd: x (…, in) of the layer's dtype -> (…, out)."""
        raise NotImplementedError

    def input_grad(self, grad: Tensor) -> Tensor:
        """Gradient of `product`: dL/dy (…, out) -> dL/dx (…, in), in grad's dtype."""
        return input_grad(grad, self.dense())

    def forward(self, input: Tensor) -> Tensor:
        """As nn.Linear: (…, in) -> (…, out)."""
        if torch.is_grad_enabled() and (input.requires_grad or self.weight.requires_grad):
            if self.weight.requires_grad:
                raise UnsupportedError(
                    "packed and quantised weights cannot be trained",
                    hint="Train adapters, or load the base with plain weights.",
                )
            return _FrozenProduct.apply(input, self)
        return self.product(input)


class Layout(nn.Module):
    """A module whose weights lie in another layout, from which the plain ones are restored bit for bit.

    A weight may be replaced by a plain one; a merge does that. The module's state_dict and a move to another dtype or
    device use the plain ones.
    """

    def plain(self) -> dict[str, Tensor]:
        """Return the weights as the plain module holds them, by name."""
        raise NotImplementedError

    def lay_out(self) -> None:
        """Bring plain weights into the layout, in place; leave them plain where that is not possible."""
        raise NotImplementedError

    def restore(self) -> None:
        """Bring the weights back to the plain module's layout, in place."""
        for name, weight in self.plain().items():
            setattr(self, name, nn.Parameter(weight.detach(), requires_grad=False))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "Layout":
        self.restore()
        super()._apply(fn, recurse)
        self.lay_out()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update((prefix + name, weight) for name, weight in self.plain().items())

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.restore()
        super()._load_from_state_dict(*args, **kwargs)
        self.lay_out()


class LayoutLinear(Layout, FrozenLinear):
    """An nn.Linear whose weight lies in another layout, from which `dense` restores it bit for bit."""

    def plain(self) -> dict[str, Tensor]:
        return {"weight": self.dense()}


class _FrozenProduct(torch.autograd.Function):
    """y = x Wᵀ + bias and dx = dy W; W is dense only while each product is computed."""

    @staticmethod
    # pyrefly: ignore [bad-override]  (torch declares any arguments)
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return layer.product(x)

    @staticmethod
    # pyrefly: ignore [bad-override]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.input_grad(grad).to(ctx.dtype), None


class UpcastLinear(FrozenLinear):
    """An nn.Linear with a plain half-precision weight, computed in float32 by `loradeck.base.matmul`."""

    def dense(self) -> Tensor:
        return self.weight

    def product(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def upcast(layer: nn.Linear) -> None:
    """Make a frozen linear layer compute in float32 if its CPU only emulates its dtype; otherwise leave it."""
    weight: Any = layer.weight
    if weight.is_cpu and not computes_in(weight.dtype, weight.device):
        layer.__class__ = UpcastLinear
