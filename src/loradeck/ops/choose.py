"""Which way the operation is computed: the only place that decides. Knows costs; knows no names."""

import torch
from torch import Tensor

from loradeck.ops import fused, packed, segmented
from loradeck.ops.forms import LinearForm
from loradeck.ops.mix import Mix
from loradeck.ops.operands import Operands, compute_dtype
from loradeck.ops.pair import Pack

# What a group costs in `segmented` beyond its arithmetic (a few small kernels), in multiply-adds of a dense product.
# Where the two cross on two CPU cores: `python -m benchmarks.ops`, benchmarks/results/ops.json.
GROUP_OVERHEAD = 1_000_000


def lora(x: Tensor, y: Tensor, operands: Operands, mix: Mix, *, training: bool) -> Tensor:
    """y[t] + Σ_a w_a · scaling_a · B_a (A_a x[t]).

    x the layer's input · y the base's output for it · `training` lets dropout act -> a tensor like y.
    """
    pack = packs(x, y, operands, mix, training=training)
    if pack is not None:
        return packed.lora(x, y, operands, mix, pack)
    if torch.is_grad_enabled() and isinstance(operands.form, LinearForm):
        return fused.lora(x, y, operands, mix, training=training)
    return segmented.lora(x, y, operands, mix, training=training)


def packs(x: Tensor, y: Tensor, operands: Operands, mix: Mix, *, training: bool) -> Pack | None:
    """Return the packed pairs where packing is both right and cheaper, else None."""
    if len(mix.groups) == 1:
        return None  # one entry for all rows: nothing to mask
    if torch.is_grad_enabled() and operands.trains:
        return None  # the packed product of N jobs costs N times their own arithmetic
    if training and operands.drops:
        return None  # each adapter has its own mask
    wasted = y.numel() * operands.width * (1 - 1 / len(mix.groups))  # multiply-adds in B; A's are of the same order
    if 2 * wasted > GROUP_OVERHEAD * len(mix.groups):
        return None
    pack = operands.pack(compute_dtype(x, y))
    return pack if pack.finite else None
