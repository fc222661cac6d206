"""The definition of the step: a whole sequence by the table's algebra, in plain torch and float32. Slow and readable.

T tokens   r rank   N heads   R numbers of a head that are turned   the other letters as in `loradeck.native.table`
"""

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from loradeck.native.quantised import Quantised
from loradeck.native.slots import Slot
from loradeck.native.table import Activation, Experts, Layer, Linear, Table

Update: TypeAlias = tuple[Tensor, Tensor, float]
"""A (r, in), B (out, r) and the scaling of one adapter at a whole module."""
Updates: TypeAlias = Mapping[str, Update]
"""By the module's path."""
Choice: TypeAlias = tuple[Tensor, Tensor]
"""Of each token's experts the shares and the numbers, each (T, chosen)."""
ACTIVATIONS: Mapping[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
SMALLEST = torch.finfo(torch.float32).smallest_normal


@torch.no_grad()
def logits(table: Table, tokens: Tensor, updates: Updates | None = None) -> Tensor:
    """Token ids (T,) of one sequence from its start -> logits (T, V) in float32, with one adapter's updates or none."""
    embedding = table.embedding
    rows = embedding.rows(tokens) if isinstance(embedding, Quantised) else embedding[tokens].float()
    hidden = rows * table.embedding_scale
    for layer in table.layers:
        hidden = layer_output(table, layer, hidden, updates)
    z = project(table.head, norm(hidden, table.norm, table.eps), updates) * table.logit_scale
    return cap(z, table.logit_cap)


def layer_output(
    table: Table, layer: Layer, hidden: Tensor, updates: Updates | None = None, choice: Choice | None = None
) -> Tensor:
    """One layer: hidden (T, H) -> (T, H). A choice of experts stands in for the router's."""
    linears, eps = layer.linears, table.eps
    x = norm(hidden, layer.attention_in, eps)
    query, key = queries_and_keys(table, layer, x, updates)
    value = project(linears["v"], x, updates).unflatten(1, (table.key_heads, table.head_dim))
    heads = attend(query, key, value, table.scale, table.softcap, layer.window)
    y = project(linears["o"], heads.flatten(1), updates)
    hidden = hidden + table.residual_scale * norm(y, layer.attention_out, eps)

    x = norm(hidden, layer.mlp_in, eps)
    if layer.experts is None:
        y = mlp(table, linears, x, updates)
    else:
        y = mix(table, layer.experts, x, choice or choose(layer.experts, x))
    return hidden + table.residual_scale * norm(y, layer.mlp_out, eps)


def mlp(table: Table, linears: Mapping[Slot, Linear], x: Tensor, updates: Updates | None = None) -> Tensor:
    """Down(activation(gate(x)) · up(x)): x (T, H) -> (T, H)."""
    gate = ACTIVATIONS[table.activation](project(linears["gate"], x, updates))
    return project(linears["down"], gate * project(linears["up"], x, updates), updates)


def choose(experts: Experts, x: Tensor) -> Choice:
    """The largest shares of softmax(router(x)), the first of equal ones: x (T, H)."""
    order = project(experts.router, x).softmax(1).sort(stable=True, dim=1, descending=True)
    shares, numbers = (each[:, : experts.chosen] for each in order)
    return (shares / shares.sum(1, keepdim=True) if experts.normalised else shares), numbers


def mix(table: Table, experts: Experts, x: Tensor, choice: Choice) -> Tensor:
    """The sum of the chosen experts' share · mlp(x): x (T, H) -> (T, H)."""
    shares, numbers = choice
    y = torch.zeros_like(x)
    for number in numbers.unique().tolist():
        tokens, places = (numbers == number).nonzero(as_tuple=True)
        y[tokens] += shares[tokens, places, None] * mlp(table, experts.mlps[number], x[tokens])
    return y


def queries_and_keys(table: Table, layer: Layer, x: Tensor, updates: Updates | None = None) -> tuple[Tensor, Tensor]:
    """x (T, H) -> queries (T, Q, D) and keys (T, K, D), normed and turned by position."""
    query, key = project(layer.linears["q"], x, updates), project(layer.linears["k"], x, updates)
    query = head_norm(query, layer.query_norm, table.eps).unflatten(1, (table.heads, table.head_dim))
    key = head_norm(key, layer.key_norm, table.eps).unflatten(1, (table.key_heads, table.head_dim))
    if layer.rotary is None:
        return query, key
    cos, sin = table.rotary[layer.rotary](len(x))
    return rotate(query, cos, sin), rotate(key, cos, sin)


def project(linear: Linear, x: Tensor, updates: Updates | None = None) -> Tensor:
    """W x + b + scaling · B (A x), the linear's own rows of W, b and B: x (T, in) -> (T, outputs)."""
    rows = slice(linear.start, linear.start + linear.outputs)
    y = F.linear(x, linear.weight[rows].float())
    if linear.bias is not None:
        y = y + linear.bias[rows].float()
    if updates and linear.path in updates:
        a, b, scaling = updates[linear.path]
        y = y + scaling * F.linear(F.linear(x, a.float()), b[rows].float())
    return y


def norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight, over the last dimension; x if there is no weight."""
    return x if weight is None else x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def head_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """The norm of each head, or of all heads together: x (T, N · D), weight (D,) or (N · D,) -> (T, N · D)."""
    return x if weight is None else norm(x.unflatten(1, (-1, len(weight))), weight, eps).flatten(1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Number d of a head and number d + R / 2 turned by an angle: x (T, N, D), cos and sin (T, R / 2) -> (T, N, D)."""
    half = cos.shape[1]
    cos, sin = cos[:, None], sin[:, None]
    left, right, rest = x.split((half, half, x.shape[2] - 2 * half), dim=2)
    return torch.cat((left * cos - right * sin, right * cos + left * sin, rest), dim=2)


def attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None, window: int | None
) -> Tensor:
    """Queries (T, Q, D), keys and values (T, K, D) -> (T, Q, D); each key serves Q / K queries in a row."""
    count, shared = len(query), query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)
    scores = cap(torch.einsum("tnd,snd->nts", query, key) * scale, softcap)
    distance = torch.arange(count)[:, None] - torch.arange(count)
    hidden = (distance < 0) | (distance >= (window or count))
    return torch.einsum("nts,snd->tnd", softmax(scores.masked_fill(hidden, -torch.inf)), value)


def softmax(scores: Tensor) -> Tensor:
    """Scores (…, T) -> the weights of T tokens, whose sum is 1."""
    return scores.softmax(-1)


def cap(z: Tensor, limit: float | None) -> Tensor:
    """Limit · tanh(z / limit); z if there is no limit."""
    return z if limit is None else limit * (z / limit).tanh()


def rounded(x: Tensor) -> Tensor:
    """What inputs x (…, I) are to quantised matrices with int8 activations, I a multiple of 32.

    32 inputs that follow each other are scale · code, where the codes are x / scale rounded, and scale = max |x| / 127.
    """
    groups = x.float().unflatten(-1, (-1, 32))
    scale = groups.abs().amax(-1, keepdim=True) / 127
    return ((groups * scale.reciprocal().where(scale >= SMALLEST, 0)).round() * scale).flatten(-2)
