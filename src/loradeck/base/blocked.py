"""Linear layers whose weight lies in blocks, as the compiled step reads it: a served base needs no second copy.

The blocks are the only copy of the weight, and copies of a model share it.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loradeck.base.frozen import LayoutLinear
from loradeck.dtypes import cpu_has
from loradeck.native.blocks import INPUTS, OUTPUTS, pack, pad, padded, unpack
from loradeck.native.library import HALVES
from loradeck.native.library import origin as library_origin
from loradeck.native.product import product

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}  # share of the largest output


class BlockWeight(nn.Parameter):
    """A weight in blocks (O / 16, I / 32, 512), padded to whole ones. It is immutable: copies of a model share it."""

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
        return unpack(weight.detach())[: self.out_features, : self.in_features].contiguous()

    def product(self, x: Tensor) -> Tensor:
        weight = self.weight
        if not isinstance(weight, BlockWeight) or x.dtype != weight.dtype or torch.is_autocast_enabled(x.device.type):
            return F.linear(x, self.dense(), self.bias)
        return product(x, weight, self.out_features, self.bias, halves=multiplies_halves(weight.dtype))

    def lay_out(self) -> None:
        block(self)


def block(linear: nn.Linear) -> None:
    """Bring a linear layer's weight into blocks, in place; leave the layer as it is where they cannot be multiplied."""
    weight = linear.weight
    if weight.device.type == "cpu" and weight.dtype in TOLERANCE and why_not_blocked(weight.dtype) is None:
        linear.__class__ = BlockLinear
        linear.weight = BlockWeight(_blocks(weight.detach()), requires_grad=False)


def multiplies_halves(dtype: torch.dtype) -> bool:
    """Whether products with weights of this dtype are computed in bfloat16, by the CPU's own instruction."""
    return (
        dtype == torch.bfloat16
        and torch.backends.cpu.get_cpu_capability() == "AVX512"  # a user may choose a lower one
        and cpu_has("avx512_bf16")
    )


def origin(dtype: torch.dtype) -> str:
    """Return where the library that multiplies weights of this dtype comes from, in words."""
    return library_origin(HALVES if multiplies_halves(dtype) else "")


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


def _blocks(weight: Tensor) -> Tensor:
    outputs, inputs = weight.shape
    return pack(pad(weight, padded(outputs, 4 * OUTPUTS), padded(inputs, INPUTS))).contiguous()
