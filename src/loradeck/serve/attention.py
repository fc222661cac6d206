"""Attention of a step's tokens over the rows they belong to. Knows a cache's pools; knows no adapters and no requests.

All tokens of a step lie in one row of the model, so everything but attention is computed for all of them at once. Rows
that get one token are computed together, pool by pool; a chunk of a prompt by itself.

T tokens of the step   Q heads   H key heads   D width of a head   N rows   C capacity
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from loradeck.serve.pool import LayerShape, Pool

NAME = "loradeck_cached"
UNKNOWN = ("s_aux", "position_bias")  # terms that some models' attention has besides


@dataclass(eq=False)
class Singles:
    """One token each for rows of a pool, which are the step's tokens from `start` on."""

    pool: Pool[Any]
    start: int
    rows: list[int]
    """Ascending."""
    positions: list[int]
    """Of the new tokens."""
    _masks: dict[int | None, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        device = self.pool.form.device
        self.stop = self.start + len(self.rows)
        self._rows = torch.tensor(self.rows, device=device)
        self._places = torch.tensor(self.positions, device=device)
        self._length = max(self.positions) + 1
        self._whole = self.rows == list(range(len(self.rows)))

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, term: "Terms") -> Tensor:
        """Query (1, Q, N, D), key and value (1, H, N, D) of the new tokens -> (N, Q, D)."""
        keys, values = self.pool.layer(layer)
        keys[self._rows, :, self._places] = key[0].transpose(0, 1)
        values[self._rows, :, self._places] = value[0].transpose(0, 1)
        rows: Tensor | slice = slice(len(self.rows)) if self._whole else self._rows
        # Heads that share keys are as many queries of one head.
        grouped = query[0].transpose(0, 1).unflatten(1, (keys.shape[1], -1))  # (N, H, Q / H, D)
        seen = keys[rows, :, : self._length], values[rows, :, : self._length]
        return _products(grouped, *seen, self._mask(term.window, query.dtype), term).flatten(1, 2)

    def _mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """Return 0 for what a row's token sees and -inf for the rest, (N, 1, 1, C); the same for all layers."""
        known = self._masks.get(window)
        if known is None:
            distance = self._places[:, None] - torch.arange(self._length, device=self._places.device)
            known = self._masks[window] = _bias(distance, window, dtype)[:, None, None]
        return known


@dataclass(eq=False)
class Chunk:
    """Several tokens of one row, which are the step's tokens from `start` on."""

    pool: Pool[Any]
    start: int
    row: int
    computed: int
    """Tokens that the row holds before."""
    length: int

    def __post_init__(self) -> None:
        self.stop = self.start + self.length

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, term: "Terms") -> Tensor:
        """Query (1, Q, N, D), key and value (1, H, N, D) of the N new tokens -> (N, Q, D)."""
        keys, values = self.pool.layer(layer)
        end = self.computed + self.length
        keys[self.row, :, self.computed : end] = key[0]
        values[self.row, :, self.computed : end] = value[0]
        if self.computed == 0 and term.softcap is None and (term.window is None or end <= term.window):
            seen = F.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=term.scale, enable_gqa=query.shape[1] != key.shape[1]
            )
            return seen[0].transpose(0, 1)
        here = torch.arange(self.computed, end, device=query.device)[:, None]
        mask = _bias(here - torch.arange(end, device=query.device), term.window, query.dtype)
        grouped = query[0].unflatten(0, (keys.shape[1], -1))  # (H, Q / H, N, D)
        seen_keys, seen_values = (tensor[self.row, :, None, :end] for tensor in (keys, values))
        shape = (-1, query.shape[1] // keys.shape[1], -1, -1)
        out = _products(grouped, seen_keys.expand(shape), seen_values.expand(shape), mask, term)
        return out.flatten(0, 1).transpose(0, 1)


@dataclass(frozen=True, slots=True)
class Terms:
    """What else a layer's attention is made of."""

    scale: float | None
    window: int | None
    softcap: float | None


Part = Singles | Chunk
_parts: ContextVar[Sequence[Part] | None] = ContextVar("loradeck_step", default=None)
_shapes: ContextVar[dict[int, LayerShape]] = ContextVar("loradeck_shapes")


@contextmanager
def step(parts: Sequence[Part]) -> Iterator[None]:
    """Let a model whose attention is NAME read one row (1, T) as these parts, until the block ends."""
    token = _parts.set(parts)
    try:
        yield
    finally:
        _parts.reset(token)


@contextmanager
def observed() -> Iterator[dict[int, LayerShape]]:
    """Find out what each layer keeps of a token, from a forward of one token in the block, by its number."""
    found: dict[int, LayerShape] = {}
    token = _shapes.set(found)
    try:
        yield found
    finally:
        _shapes.reset(token)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """Query (1, Q, T, D), key and value (1, H, T, D) -> (1, T, Q, D)."""
    parts = _parts.get()
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    if parts is None:
        _shapes.get()[layer] = LayerShape(key.shape[1], key.shape[3], value.shape[3])
        return value.repeat_interleave(query.shape[1] // key.shape[1], dim=1).transpose(1, 2), None
    if any(settings.get(name) is not None for name in UNKNOWN):
        raise ValueError("this attention has a term of its own")
    term = Terms(settings.get("scaling"), settings.get("sliding_window"), settings.get("softcap"))
    seen = []
    for part in parts:
        span = slice(part.start, part.stop)
        seen.append(part.attend(layer, query[:, :, span], key[:, :, span], value[:, :, span], term))
    return (seen[0] if len(seen) == 1 else torch.cat(seen))[None], None


def _products(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, term: Terms) -> Tensor:
    if term.softcap is None:
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=term.scale)
    scale = query.shape[-1] ** -0.5 if term.scale is None else term.scale
    scores = (query @ keys.transpose(-1, -2)).float() * scale
    scores = torch.tanh(scores / term.softcap) * term.softcap + mask
    return scores.softmax(-1).to(values.dtype) @ values


def _bias(distance: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
    """Return 0 where a token sees another so far before it, and -inf elsewhere."""
    seen = distance >= 0
    if window is not None:
        seen &= distance < window
    return torch.zeros(distance.shape, dtype=dtype, device=distance.device).masked_fill_(~seen, float("-inf"))


def _mask(*_: Any, **__: Any) -> None:
    """Make none: which tokens see each other follows from their parts."""


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
