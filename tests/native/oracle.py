"""What a table computes for one sequence, in float64, straight from its definition."""

import torch
import torch.nn.functional as F
from tests.native.tables import Blend
from torch import Tensor

from loradeck.native.table import Layer, Linear, Table


def logits(table: Table, tokens: list[int], blend: Blend, cache: torch.dtype, halves: bool) -> Tensor:
    """Return the logits (N, V). Keys and values are rounded to the cache's dtype; with `halves`, all that matrices are
    multiplied with is rounded to bfloat16."""
    embedding = table.embedding.double()
    if table.embedding_scales is not None:
        embedding = embedding * table.embedding_scales.double()[:, None]
    hidden = embedding[tokens] * table.embedding_scale
    for layer in table.layers:
        x = norm(hidden, layer.attention_in, table.eps)
        y = product(layer.linears["o"], attention(table, layer, x, blend, cache, halves), blend, halves)
        hidden = hidden + table.residual_scale * norm(y, layer.attention_out, table.eps)
        x = norm(hidden, layer.mlp_in, table.eps)
        gate, up = (product(layer.linears[slot], x, blend, halves) for slot in ("gate", "up"))
        act = (
            F.silu(gate)
            if table.activation == "silu"
            else F.gelu(gate, approximate="tanh" if table.activation == "gelu_tanh" else "none")
        )
        y = product(layer.linears["down"], act * up, blend, halves)
        hidden = hidden + table.residual_scale * norm(y, layer.mlp_out, table.eps)
    return cap(
        product(table.head, norm(hidden, table.norm, table.eps), (), halves) * table.logit_scale, table.logit_cap
    )


def norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return x if weight is None else x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight.double()


def cap(x: Tensor, limit: float | None) -> Tensor:
    return x if limit is None else limit * torch.tanh(x / limit)


def halved(x: Tensor, halves: bool) -> Tensor:
    return x.bfloat16().double() if halves else x


def product(linear: Linear, x: Tensor, blend: Blend, halves: bool) -> Tensor:
    rows = slice(linear.start, linear.start + linear.outputs)
    x = halved(x, halves)
    y = x @ linear.weight[rows].double().T
    if linear.scales is not None:
        y = y * linear.scales[rows].double()
    if linear.bias is not None:
        y = y + linear.bias[rows].double()
    for pairs, weight in blend:
        if pair := pairs.get(linear.path):
            y = y + weight * pair.scaling * (x @ pair.a.double().T) @ pair.b[rows].double().T
    return y


def attention(table: Table, layer: Layer, x: Tensor, blend: Blend, cache: torch.dtype, halves: bool) -> Tensor:
    def heads(slot: str, weight: Tensor | None, turned: bool) -> Tensor:
        y = product(layer.linears[slot], x, blend, halves)
        if weight is not None and len(weight) != table.head_dim:
            y = norm(y, weight, table.eps)
        y = y.view(len(x), -1, table.head_dim)
        if weight is not None and len(weight) == table.head_dim:
            y = norm(y, weight, table.eps)
        if turned and layer.rotary is not None:
            cos, sin = (t.double()[:, None] for t in table.rotary[layer.rotary](len(x)))
            half = cos.shape[-1]
            a, b, rest = y[..., :half], y[..., half : 2 * half], y[..., 2 * half :]
            y = torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)
        return y.transpose(0, 1)

    query, key = heads("q", layer.query_norm, True), heads("k", layer.key_norm, True)
    value = heads("v", None, False)
    group = table.heads // table.key_heads
    key, value = (t.to(cache).double().repeat_interleave(group, 0) for t in (key, value))
    scores = cap(halved(query * table.scale, halves) @ key.transpose(1, 2), table.softcap)
    ago = torch.arange(len(x))[:, None] - torch.arange(len(x))
    seen = (ago >= 0) & (ago < (layer.window or len(x)))
    weights = (scores - scores.masked_fill(~seen, -torch.inf).amax(-1, keepdim=True)).exp() * seen
    out = halved(weights, halves) @ value / weights.sum(-1, keepdim=True)
    return out.transpose(0, 1).reshape(len(x), -1)
