"""Which way the operation is computed: the only place that decides. Knows costs; knows no names."""

import torch
from torch import Tensor

from loradeck.ops import fused, segmented, stacked
from loradeck.ops.forms import LinearForm
from loradeck.ops.mix import Mix
from loradeck.ops.operands import Operands
from loradeck.ops.plan import Plan, plan_of


def lora(x: Tensor, y: Tensor, operands: Operands, mix: Mix, *, training: bool) -> Tensor:
    """y[t] + Σ_a w_a · scaling_a · B_a (A_a x[t]).

    x the layer's input · y the base's output for it · `training` lets dropout act -> a tensor like y.
    """
    if torch.is_grad_enabled() and isinstance(operands.form, LinearForm):
        return fused.lora(x, y, operands, mix, training=training)
    plan = stacks(x, operands, mix, training=training)
    if plan is None:
        return segmented.lora(x, y, operands, mix, training=training)
    if plan.stripes:
        y = stacked.lora(x, y, operands, mix, plan)
    return segmented.lora(x, y, operands, mix, plan.groups) if plan.groups else y


def stacks(x: Tensor, operands: Operands, mix: Mix, *, training: bool) -> Plan | None:
    """Return which rows are computed in stacks and which group by group; None where stacks are not for this."""
    if torch.is_grad_enabled() or not isinstance(operands.form, LinearForm):
        return None
    if len(mix.groups) == 1 or (training and operands.drops):
        return None  # one entry for all rows, or masks of each adapter's own
    return plan_of(mix, operands.slots, operands.form.count(x) // mix.total, x.device)
