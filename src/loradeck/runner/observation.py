"""One layer of a decoder computed alone, and what it called its attention with.

T tokens   H hidden size   Q query heads   K key heads   D width of a head
"""

from collections.abc import Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from loradeck.native import reference
from loradeck.native.table import Experts
from loradeck.runner.layer_kind import NUMBER, NUMBERED

NAME = "loradeck_observed"


@dataclass(frozen=True, slots=True, eq=False)
class Observation:
    """What a layer did."""

    query: Tensor
    """(T, Q, D) in float32, normed and turned."""
    key: Tensor
    """(T, K, D) in float32"""
    scale: float
    window: int | None
    softcap: float | None
    others: list[str]
    """Names of more tensors that its attention takes."""
    output: Tensor
    """(T, H) of the layer."""
    uses_number: bool
    """Whether it looked at its place in the decoder, so that one of the same kind may compute something else."""


def _refuse(*_: object) -> Any:
    raise TypeError("the layer's number is hidden")


class HiddenNumber:
    """Stands in for a layer's number. It can be passed on, and whatever else is done with it fails."""

    __eq__ = __hash__ = __bool__ = __repr__ = _refuse


class FixedRouter(nn.Module):
    """A router that gives each token the experts after those of the token before, so that no rounding changes them."""

    def __init__(self, experts: Experts, x: Tensor) -> None:
        """Choose for as many tokens as x (T, H) has."""
        super().__init__()
        shares = torch.arange(1, 1 + experts.chosen).div(experts.chosen).to(x.dtype)
        numbers = torch.arange(len(x) * experts.chosen).view(len(x), -1) % len(experts.mlps)
        self.choice: reference.Choice = shares.expand(len(x), -1), numbers

    def forward(self, _: Tensor) -> tuple[None, Tensor, Tensor]:
        """Return what transformers' routers return: logits, which nothing needs, shares and numbers."""
        return None, *self.choice


def with_part(module: nn.Module, path: Sequence[str], part: nn.Module) -> nn.Module:
    """Return a shallow copy of a module in which another part stands at a path."""
    name, *rest = path
    alone = copy(module)
    alone._modules = {**module._modules, name: with_part(module.get_submodule(name), rest, part) if rest else part}
    return alone


def observe(layer: nn.Module, x: Tensor, **arguments: Any) -> Observation:
    """Compute a layer alone on x (T, H). A shallow copy computes, so the layer itself stays as it is.

    Raises:
        LookupError: its attention is not one that can be replaced.
        Exception: what the layer raises if it cannot be called so.
    """
    with suppress(Exception):
        return _observe(layer, x, arguments, hides_number=True)
    return _observe(layer, x, arguments, hides_number=False)


def _observe(layer: nn.Module, x: Tensor, arguments: dict[str, Any], *, hides_number: bool) -> Observation:
    attention: Any = copy(layer.self_attn)
    attention.config = copy(attention.config)
    attention.config._attn_implementation = NAME
    alone = with_part(layer, ["self_attn"], attention)
    if hides_number:
        for path in NUMBERED:
            module = alone.get_submodule(path)
            if NUMBER in vars(module):
                setattr(module, NUMBER, HiddenNumber())
    with torch.no_grad():
        output = alone(x[None], attention_mask=None, **arguments)
    if "call" not in vars(attention):
        raise LookupError("its attention is not one that can be replaced")
    output = output if isinstance(output, Tensor) else output[0]
    return Observation(*attention.call, output=output[0], uses_number=not hides_number)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Query (1, Q, T, D), key and value (1, K, T, D) -> (1, T, Q, D)."""
    q, k, v = (tensor[0].transpose(0, 1).float() for tensor in (query, key, value))
    scale = q.shape[2] ** -0.5 if scaling is None else scaling
    tensors = [name for name, other in others.items() if isinstance(other, Tensor) and name != "position_ids"]
    module.call = (q, k, scale, sliding_window, softcap, tensors)
    return reference.attend(q, k, v, scale, softcap, sliding_window).to(query.dtype)[None], None


AttentionInterface.register(NAME, _attention)
