"""The definition: a slow loop over runs. Every fast twin has this signature and must agree with it."""

from torch import Tensor

from loradeck.ops.layer_kinds import Form
from loradeck.ops.mapping import Mix
from loradeck.ops.operands import Operands, compute_dtype


def lora(x: Tensor, y: Tensor, operands: Operands, mix: Mix) -> Tensor:
    """y[t] + Σ_a w_a · scaling_a · B_a (A_a x[t]), run by run.

    x the layer's input · y the base's output for it -> a tensor like y. Dropout is not part of the definition.
    """
    form: Form = operands.form
    items, z, dtype = form.items(x), form.positions(y).clone(), compute_dtype(x, y)
    if items.is_floating_point():
        items = items.to(dtype)
    per_run, per_item = items.shape[0] // mix.total, z.shape[0] // items.shape[0]
    start = 0
    for entry, length in zip(mix.entries, mix.lengths, strict=True):
        stop = start + length * per_run
        for operand, weight in entry:
            pair = operands.pair(operand, dtype)
            if pair is not None:
                h = form.shrink(items[start:stop], pair.a)
                update = weight * pair.scaling * (h @ form.dense_b(pair.b).T)
                z[start * per_item : stop * per_item] += update.to(z.dtype)
        start = stop
    return form.restore(z, y)
