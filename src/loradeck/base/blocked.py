"""Linear layers and experts whose weights lie in blocks, as the compiled step reads them: a base needs no second copy.

The blocks are the only copy of the weight, and copies of a model share it.
"""

import math
from copy import copy
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loradeck.base.frozen import Layout, LayoutLinear
from loradeck.dtypes import cpu_has
from loradeck.native.blocks import INPUTS, OUTPUTS, pack, pad, padded, unpack
from loradeck.native.library import multiplies_halves, options_for
from loradeck.native.library import origin as library_origin
from loradeck.native.product import product

MIXTURE = {"gate", "router", "experts"}  # the modules of a mixture of experts
EXPERTS = ("gate_up_proj", "down_proj")  # weights of stacked experts, (E, 2 J, H) and (E, H, J)
MANY = 512  # rows: from here on oneDNN multiplies float32 faster, on a plain copy of the weight
MANY_AMX = 128  # rows: from here on it multiplies bfloat16 faster, where the CPU has tiles of it
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}  # share of the largest output


class BlockWeight(nn.Parameter):
    """A weight in blocks (…, O / 16, I / 32, 512), padded to whole ones. It is immutable: models share it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "BlockWeight":
        return self

    def __reduce_ex__(self, proto: Any) -> tuple[Any, ...]:
        return BlockWeight, (self.detach(), False)


class BlockLinear(LayoutLinear):
    """An nn.Linear with a weight in blocks, or with a plain one that has replaced it."""

    def dense(self) -> Tensor:
        weight = self.weight
        if not isinstance(weight, BlockWeight):
            return weight
        return _plain(weight.detach(), self.out_features, self.in_features)

    def product(self, x: Tensor) -> Tensor:
        weight = self.weight
        many = x.shape[:-1].numel() >= _many(x.dtype)
        mixed = x.dtype != weight.dtype or torch.is_autocast_enabled(x.device.type)
        if many or mixed or not isinstance(weight, BlockWeight):
            return F.linear(x, self.dense(), self.bias)
        return product(x, weight, self.out_features, self.bias, halves=multiplies_halves(weight.dtype))

    def lay_out(self) -> None:
        block(self)


def block(linear: nn.Linear) -> None:
    """Bring a linear layer's weight into blocks, in place; leave the layer as it is where they cannot be multiplied."""
    weight = linear.weight
    if _fits(weight):
        linear.__class__ = BlockLinear
        linear.weight = BlockWeight(_blocks(weight.detach()), requires_grad=False)


class BlockExperts(Layout):
    """The experts of a mixture, as transformers stacks them, with weights in blocks.

    Attributes:
        plain_class: what the module was.
        shapes: (O, I) of an expert's weight, by name.
    """

    plain_class: type[nn.Module]
    shapes: dict[str, tuple[int, int]]

    def dense(self, name: str, experts: Tensor | slice = slice(None)) -> Tensor:
        """Return the plain weight (E, O, I) of some experts."""
        weight = self.get_parameter(name)
        part = weight.detach()[experts]
        return _plain(part, *self.shapes[name]) if isinstance(weight, BlockWeight) else part

    def plain(self) -> dict[str, Tensor]:
        return {name: self.dense(name) for name in EXPERTS}

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As the plain module's, with plain copies of the experts that are chosen."""
        chosen, numbers = top_k_index.unique(return_inverse=True)
        module: Any = copy(self)
        module.__class__ = self.plain_class
        module.num_experts = len(chosen)
        module._parameters = {name: self.dense(name, chosen) for name in EXPERTS}
        return module.forward(hidden_states, numbers, top_k_weights)

    def lay_out(self) -> None:
        block_experts(self)


def block_experts(module: nn.Module) -> None:
    """Bring the weights of stacked experts into blocks, in place; leave any other module as it is."""
    shapes = expert_shapes(module)
    if shapes is None or not all(_fits(module.get_parameter(name)) for name in EXPERTS):
        return
    experts: Any = module
    if not isinstance(module, BlockExperts):
        experts.plain_class, experts.shapes = type(module), shapes
        experts.__class__ = BlockExperts
    for name in EXPERTS:
        setattr(experts, name, BlockWeight(_blocks(module.get_parameter(name).detach()), requires_grad=False))


def expert_shapes(module: nn.Module) -> dict[str, tuple[int, int]] | None:
    """Return (O, I) of an expert's weights, by name; None of a module that is not what `BlockExperts` are of."""
    if isinstance(module, BlockExperts):
        return module.shapes
    if {*module._parameters} != {*EXPERTS} or not hasattr(module, "num_experts"):
        return None
    (_, *gate_up), (_, *down) = (module.get_parameter(name).shape for name in EXPERTS)
    if len(down) != 2 or gate_up != [2 * down[1], down[0]]:
        return None
    return {EXPERTS[0]: (gate_up[0], gate_up[1]), EXPERTS[1]: (down[0], down[1])}


def origin(dtype: torch.dtype) -> str:
    """Return where the library that multiplies weights of this dtype comes from, in words."""
    return library_origin(options_for(halves=multiplies_halves(dtype)))


@cache
def why_not_blocked(dtype: torch.dtype) -> str | None:
    """Return why weights of this dtype are not multiplied in blocks on this machine, or None if they are.

    Checked once a process, against torch's product.
    """
    try:
        with torch.inference_mode(False), torch.no_grad():
            rng = torch.Generator().manual_seed(0)
            x, weight, bias = (torch.randn(shape, generator=rng).to(dtype) for shape in ((21, 70), (90, 70), (90,)))
            result = product(x, _blocks(weight), len(weight), bias, halves=multiplies_halves(dtype)).float()
            expected = F.linear(x.float(), weight.float(), bias.float())
            error = float((result - expected).abs().max() / expected.abs().max())
    except Exception as error:  # compilers that are missing, or refuse this machine, raise no common type
        return f"is unavailable ({str(error).partition(chr(10))[0][:100] or type(error).__name__})"
    return None if error <= TOLERANCE[dtype] else f"is off by {error:.1e} on this machine"


@cache
def _many(dtype: torch.dtype) -> float:
    """Return the number of rows from which on oneDNN is faster."""
    if dtype == torch.bfloat16 and cpu_has("amx_bf16"):
        return MANY_AMX
    return MANY if dtype == torch.float32 else math.inf


def _fits(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype in TOLERANCE and why_not_blocked(weight.dtype) is None


def _blocks(weight: Tensor) -> Tensor:
    """(…, O, I) -> (…, O / 16, I / 32, 512), padded."""
    *experts, outputs, inputs = weight.shape
    whole = pad(weight, *experts, padded(outputs, 4 * OUTPUTS), padded(inputs, INPUTS))
    return pack(whole.flatten(0, -2)).unflatten(0, (*experts, -1)).contiguous()


def _plain(blocks: Tensor, outputs: int, inputs: int) -> Tensor:
    """(…, O / 16, I / 32, 512) -> (…, O, I)"""
    whole = unpack(blocks.flatten(0, -3)).unflatten(0, (*blocks.shape[:-3], blocks.shape[-3] * OUTPUTS))
    return whole[..., :outputs, :inputs].contiguous()
