"""The definition: a slow loop over the batch's entries. Every kernel must agree with it."""

from torch import Tensor

from loradeck.ops.mapping import LoraMapping
from loradeck.ops.weights import LayerAdapters, compute_dtype


def lora(x: Tensor, y: Tensor, adapters: LayerAdapters, mapping: LoraMapping) -> Tensor:
    """y[t] + Σ_a w_a · scaling_a · B_a (A_a x[t]), entry by entry.

    x the layer's input · y the base's output for it, not written to -> a tensor like y. Dropout is not part of the
    definition.
    """
    kind = adapters.kind
    items, z, dtype = kind.items(x), kind.positions(y).clone(), compute_dtype(x, y)
    if items.is_floating_point():
        items = items.to(dtype)
    per_row, per_item = items.shape[0] // mapping.total, z.shape[0] // items.shape[0]
    start = 0
    for entry, length in zip(mapping.entries, mapping.lengths, strict=True):
        stop = start + length * per_row
        for adapter, weight in entry:
            weights = adapters.weights[adapter]
            if weights is not None:
                weights = weights.to(dtype)
                h = kind.shrink(items[start:stop], weights.a)
                update = weight * weights.scaling * (h @ kind.dense_b(weights.b).T)
                z[start * per_item : stop * per_item] += update.to(z.dtype)
        start = stop
    return kind.restore(z, y)
