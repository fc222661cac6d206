"""What a decoder computes, as numbers: everything the step needs to know of a model.

    hidden[t] = embedding[token[t]] · embedding_scale
    for each layer:
        hidden += residual_scale · attention_out(o(attend(q(x), k(x), v(x))))       x = attention_in(hidden)
        hidden += residual_scale · mlp_out(mlp(x))                                  x = mlp_in(hidden)
    logits = cap(head(norm(hidden)) · logit_scale)

A norm is x / sqrt(mean(x²) + eps) · weight; one that is None leaves x as it is. cap(z) is z, or where there is a
logit_cap, logit_cap · tanh(z / logit_cap). Queries and keys are normed and rotated by position. Attention is the
softmax of their products times `scale`, capped by `softcap` in the same way, over the tokens before, within the layer's
window. An mlp is down(activation(gate(x)) · up(x)); of a mixture of experts, the sum of those that softmax(router(x))
gives the most, each times its share.

H hidden size   Q query heads   K key heads   D width of a head   I intermediate size   V vocabulary   P positions
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from loradeck.native.blocks import unpack
from loradeck.native.quantised import Quantised
from loradeck.native.slots import Slot

Activation: TypeAlias = Literal["silu", "gelu", "gelu_tanh"]


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """The rows `start` to `start + outputs` of a module's weight: one of several where a model fuses them.

    `path` is the module's, from the model's root: that of the adapters that apply to it.
    """

    path: str
    stored: Tensor | Quantised
    """The whole module's weight: (out, in) in float32, bfloat16 or float16, in blocks, or quantised."""
    start: int
    outputs: int
    bias: Tensor | None = None
    """(out,) of the whole module."""
    blocked: int = 0
    """How many inputs a weight in blocks has; 0: it is (out, in)."""

    @property
    def weight(self) -> Tensor:
        """The whole module's weight (out, in); of one in blocks a copy, with what pads its last outputs."""
        if isinstance(self.stored, Quantised):
            return self.stored.dense()
        return unpack(self.stored.detach())[:, : self.blocked] if self.blocked else self.stored


@dataclass(frozen=True, slots=True, eq=False)
class Experts:
    """A mixture of experts."""

    router: Linear
    """An output for each expert."""
    chosen: int
    """How many experts compute a token: those with the largest shares, the first of equal ones."""
    normalised: bool
    """Whether the shares are divided by their sum."""
    mlps: tuple[Mapping[Slot, Linear], ...]
    """Gate, up and down of each."""


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """One layer; a norm is its weight in float32, or None."""

    linears: Mapping[Slot, Linear]
    """Of all slots, but of a mixture's only those of attention."""
    attention_in: Tensor | None
    """(H,)"""
    attention_out: Tensor | None
    """(H,)"""
    mlp_in: Tensor | None
    """(H,)"""
    mlp_out: Tensor | None
    """(H,)"""
    query_norm: Tensor | None
    """(D,), the same for each head; or (Q · D,), over all heads together."""
    key_norm: Tensor | None
    """(D,) or (K · D,)."""
    rotary: int | None
    """Index in the table's `rotary`; None: positions do not turn this layer's queries and keys."""
    window: int | None
    """How many tokens back a token sees, itself included; None: all."""
    experts: Experts | None = None

    @property
    def mlps(self) -> tuple[Mapping[Slot, Linear], ...]:
        """The linears of each expert, or of the one MLP."""
        return self.experts.mlps if self.experts else (self.linears,)

    @property
    def dtypes(self) -> set[torch.dtype]:
        """The dtypes of its weights that are not quantised."""
        linears = [linear for each in (self.linears, *self.mlps) for linear in each.values()]
        weights = [linear.stored for linear in (*linears, *([self.experts.router] if self.experts else []))]
        return {weight.dtype for weight in weights if isinstance(weight, Tensor)}


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """A model as the step computes it."""

    hidden: int
    heads: int
    key_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    eps: float
    """Of all norms."""
    layers: tuple[Layer, ...]
    embedding: Tensor | Quantised
    """(V, H); the same object as `head.stored` where they are tied."""
    embedding_scale: float
    norm: Tensor
    """(H,), before the head."""
    head: Linear
    rotary: tuple[Callable[[int], tuple[Tensor, Tensor]], ...]
    """Each returns for the first P positions cos and sin (P, R / 2) in float32. The first R numbers of a head are
    turned: number d with number d + R / 2."""
    activation: Activation
    scale: float
    softcap: float | None
    """Of attention's scores."""
    residual_scale: float
    logit_scale: float
    logit_cap: float | None
