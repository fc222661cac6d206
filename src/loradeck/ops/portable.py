"""The update in torch's own products, one adapter after another: every kind of layer, every device, with dropout.

Each adapter's products read its own tokens only, so a NaN stays in its segment.
"""

import torch
from torch import Tensor

from loradeck.ops.dropout import dropped
from loradeck.ops.segments import Segments, add, take
from loradeck.ops.weights import LayerAdapters, compute_dtype, in_range


def lora(x: Tensor, y: Tensor, adapters: LayerAdapters, segments: Segments, *, training: bool = False) -> Tensor:
    """y[s] + w · scaling_a · B_a (A_a dropout_a(x[s])) for each segment s, of adapter a.

    x the layer's input · y the base's output for it, updated in place unless autograd records -> a tensor like y.
    Dropout acts only when `training`.
    """
    kind, dtype = adapters.kind, compute_dtype(x, y)
    items, z = kind.items(x), kind.positions(y)
    if items.is_floating_point():
        items = items.to(dtype)
    in_place = not torch.is_grad_enabled()
    positions = segments.repeat(z.shape[0] // max(items.shape[0], 1))
    rows: list[Tensor] = []
    updates: list[Tensor] = []
    for segment, at in zip(segments.all, positions.all, strict=True):
        weights = adapters.weights[segment.adapter]
        if weights is None:
            continue
        weights = weights.to(dtype)
        x_rows, factor = take(items, segment.rows), weights.scaling
        if training and weights.dropout and x_rows.is_floating_point():  # token ids have nothing to drop
            x_rows = dropped(x_rows, weights.dropout.keep(x_rows.shape, weights.path, x_rows.device))
            factor *= weights.dropout.scale
        h, b = kind.shrink(x_rows, weights.a), kind.dense_b(weights.b).T
        if isinstance(at.weight, Tensor):
            h = h * at.weight.to(h.dtype)
        else:
            factor *= at.weight
        if in_place:
            add(z, at.rows, h, b, factor=in_range(factor, dtype))
        else:
            updates.append((factor * (h @ b)).to(z.dtype))
            rows.append(
                torch.arange(at.rows.start, at.rows.stop, device=z.device) if isinstance(at.rows, slice) else at.rows
            )
    if updates:
        z = z.index_add(0, torch.cat(rows), torch.cat(updates))
    return kind.restore(z, y) if in_place or updates else y
