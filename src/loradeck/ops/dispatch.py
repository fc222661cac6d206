"""Which way the operation is computed: the only place that decides. Knows costs; knows no names."""

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from loradeck.ops import autograd, cpu, packed, portable, stacked
from loradeck.ops.layer_kinds import LinearForm
from loradeck.ops.mapping import Group, Mix
from loradeck.ops.operands import Operands, compute_dtype
from loradeck.ops.plan import Plan, plan_of

WIDEST = 256  # ranks that are worth computing for every row


def lora(x: Tensor, y: Tensor, operands: Operands, mix: Mix, *, training: bool) -> Tensor:
    """y[t] + Σ_a w_a · scaling_a · B_a (A_a x[t]).

    x the layer's input · y the base's output for it · `training` lets dropout act -> a tensor like y.
    """
    if not isinstance(operands.form, LinearForm) or (training and operands.drops and not torch.is_grad_enabled()):
        return portable.lora(x, y, operands, mix, training=training)
    if torch.is_grad_enabled():
        return autograd.lora(x, y, operands, mix, training=training)
    groups: Sequence[Group]
    if cpu.takes(x, y):
        plan = cpu.plan(mix, operands.slots, operands.form.count(x) // mix.total)
        y, groups = cpu.lora(x, y, operands, mix, plan), plan.groups
    elif len(mix.groups) == 1:
        groups = mix.groups
    else:
        stacks = plan_of(mix, operands.slots, operands.form.count(x) // mix.total, x.device)
        y, groups = _stripes(x, y, operands, mix, stacks), stacks.groups
    if not groups:
        return y
    way = packed.lora if packs(x, y, operands, groups) else portable.lora
    return way(x, y, operands, mix, groups)


def packs(x: Tensor, y: Tensor, operands: Operands, groups: Sequence[Group]) -> bool:
    """Say whether groups with many rows are computed side by side: where this is both right and cheaper."""
    used = {operand for group in groups for operand, _ in group.entry}
    pairs = [pair for operand in used if (pair := operands.pairs[operand])]
    dtype = compute_dtype(x, y)
    return (
        len(groups) > 1
        and dtype in (torch.bfloat16, torch.float16)
        and sum(pair.r for pair in pairs) <= WIDEST
        and all(operands.finite(operand, dtype) for operand in used)
    )


def warm_up(device: torch.device) -> None:
    """Try the device's kernels now, not at the first forward with an adapter: a compiler may have to run for them."""
    if device.type == "cpu":
        cpu.problem()
    triton_problem(device)


@cache
def triton_problem(device: torch.device) -> str:
    """Say why few rows of many adapters do not go through the Triton kernels on a device; "" where they do."""
    if device.type != "cuda":
        return "is for GPUs"
    if find_spec("triton") is None:
        return "needs the package triton"
    from loradeck.ops import gpu

    return gpu.problem(device)


def _stripes(x: Tensor, y: Tensor, operands: Operands, mix: Mix, plan: Plan) -> Tensor:
    if x.is_cuda and y.dtype == x.dtype != torch.float64 and not triton_problem(x.device):
        from loradeck.ops import gpu

        return gpu.lora(x, y, operands, mix, plan)
    return stacked.lora(x, y, operands, mix, plan)
