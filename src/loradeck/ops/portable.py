"""Rows sorted by what they go through, then one group after another. Best for long rows; trains what `fused` cannot.

No row meets a neighbour's tensors, so this is also the way of an adapter that is not finite.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from loradeck.ops.dropout import dropped
from loradeck.ops.mapping import Group, Mix, add, take
from loradeck.ops.operands import Operands, compute_dtype


def lora(
    x: Tensor,
    y: Tensor,
    operands: Operands,
    mix: Mix,
    groups: Sequence[Group] | None = None,
    *,
    training: bool = False,
) -> Tensor:
    """y[g] + Σ_a w_a · scaling_a · B_a (A_a dropout_a(x[g])) for each group g of rows, by default all of the mix.

    x the layer's input · y the base's output for it -> a tensor like y. Dropout acts only when `training`.
    """
    form = operands.form
    dtype = compute_dtype(x, y)
    items, z = form.items(x), form.positions(y)
    if items.is_floating_point():
        items = items.to(dtype)
    in_place = not torch.is_grad_enabled()
    per_run, per_item = items.shape[0] // mix.total, z.shape[0] // max(items.shape[0], 1)
    updates: list[tuple[Tensor | slice, Tensor]] = []
    for group in mix.groups if groups is None else groups:
        own: Tensor | None = None
        rows: Tensor | slice | None = None
        places: Tensor | slice | None = None
        for operand, weight in group.entry:
            pair = operands.pair(operand, dtype)
            if pair is None:
                continue
            if rows is None or places is None:
                rows = group.rows(per_run, items.device)
                places = rows if per_item == 1 else group.rows(per_run * per_item, z.device)
            x_rows, factor = take(items, rows), weight * pair.scaling
            if training and pair.dropout and x_rows.is_floating_point():  # ids have nothing to drop
                x_rows = dropped(x_rows, pair.dropout.keep(x_rows.shape, pair.place, x_rows.device))
                factor *= pair.dropout.scale
            h = form.shrink(x_rows, pair.a)
            b = form.dense_b(pair.b).T
            if in_place:
                add(z, places, h, b, factor=factor)
            else:
                own = factor * (h @ b) if own is None else torch.add(own, h @ b, alpha=factor)
        if own is not None and places is not None:
            updates.append((places, own))
    if in_place:
        return form.restore(z, y)
    return form.restore(_added(z, updates), y) if updates else y


def _added(z: Tensor, updates: list[tuple[Tensor | slice, Tensor]]) -> Tensor:
    """Add without writing to z, in one autograd node where the groups are runs."""
    runs = [(rows.start, rows.stop, own) for rows, own in updates if isinstance(rows, slice)]
    if len(runs) < len(updates):
        for rows, own in updates:
            index = torch.arange(rows.start, rows.stop, device=z.device) if isinstance(rows, slice) else rows
            z = z.index_add(0, index, own.to(z.dtype))
        return z
    pieces: list[Tensor] = []
    end = 0
    for start, stop, own in sorted(runs, key=lambda run: run[0]):
        pieces += [z.new_zeros(start - end, z.shape[1]), own.to(z.dtype)]
        end = stop
    pieces.append(z.new_zeros(z.shape[0] - end, z.shape[1]))
    return z + torch.cat(pieces)
