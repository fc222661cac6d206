"""Attention of a step's tokens to the rows of the KV cache that they belong to.

All tokens of a step lie in one row of the model, so that everything but attention is computed for all of them at once.
Rows that decode one token are computed together, pool by pool; each chunk of a prompt by itself.

T tokens of the step   Q heads   H key heads   D width of a head   N rows   C capacity
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from loradeck.runner.kv_cache import LayerShape, Pool

NAME = "loradeck_cached"
UNSUPPORTED = ("s_aux", "position_bias")  # additional arguments of some models' attention


@dataclass(frozen=True, slots=True)
class AttentionParams:
    """What a layer's attention depends on besides queries, keys and values."""

    scale: float | None
    window: int | None
    softcap: float | None


@dataclass(eq=False)
class Decode:
    """One token for each of some rows of a pool; in the step, they follow each other from `start` on."""

    pool: Pool[Any]
    start: int
    rows: list[int]
    """Ascending."""
    positions: list[int]
    """Of the new tokens."""
    _masks: dict[int | None, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        device = self.pool.layout.device
        self.stop = self.start + len(self.rows)
        self._rows = torch.tensor(self.rows, device=device)
        self._positions = torch.tensor(self.positions, device=device)
        self._length = max(self.positions) + 1
        self._contiguous = self.rows == list(range(len(self.rows)))

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams) -> Tensor:
        """Query (1, Q, N, D), key and value (1, H, N, D) of the new tokens -> (N, Q, D)."""
        keys, values = self.pool.layer(layer)
        keys[self._rows, :, self._positions] = key[0].transpose(0, 1)
        values[self._rows, :, self._positions] = value[0].transpose(0, 1)
        rows: Tensor | slice = slice(len(self.rows)) if self._contiguous else self._rows
        # Heads that share keys become several queries of one head.
        grouped = query[0].transpose(0, 1).unflatten(1, (keys.shape[1], -1))  # (N, H, Q / H, D)
        mask = self._mask(params.window, query.dtype)
        out = _attend(grouped, keys[rows, :, : self._length], values[rows, :, : self._length], mask, params)
        return out.flatten(1, 2)

    def _mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """Return 0 for what a row's token sees and -inf for the rest, (N, 1, 1, C); the same for all layers."""
        mask = self._masks.get(window)
        if mask is None:
            distance = self._positions[:, None] - torch.arange(self._length, device=self._positions.device)
            mask = self._masks[window] = _bias(distance, window, dtype)[:, None, None]
        return mask


@dataclass(eq=False)
class PromptChunk:
    """Several tokens of one row; in the step, they follow each other from `start` on."""

    pool: Pool[Any]
    start: int
    row: int
    computed: int
    """Tokens that the row holds already."""
    length: int

    def __post_init__(self) -> None:
        self.stop = self.start + self.length

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams) -> Tensor:
        """Query (1, Q, N, D), key and value (1, H, N, D) of the N new tokens -> (N, Q, D)."""
        keys, values = self.pool.layer(layer)
        end = self.computed + self.length
        keys[self.row, :, self.computed : end] = key[0]
        values[self.row, :, self.computed : end] = value[0]
        if self.computed == 0 and params.softcap is None and (params.window is None or end <= params.window):
            out = F.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=params.scale, enable_gqa=query.shape[1] != key.shape[1]
            )
            return out[0].transpose(0, 1)
        return attend_all(query, keys[self.row, :, :end], values[self.row, :, :end], self.computed, params)


def attend_all(query: Tensor, keys: Tensor, values: Tensor, computed: int, params: AttentionParams) -> Tensor:
    """Query (1, Q, N, D) of tokens from position `computed` on, keys and values (H, tokens, D) of all -> (N, Q, D)."""
    end = keys.shape[1]
    positions = torch.arange(computed, end, device=query.device)[:, None]
    mask = _bias(positions - torch.arange(end, device=query.device), params.window, query.dtype)
    grouped = query[0].unflatten(0, (keys.shape[0], -1))  # (H, Q / H, N, D)
    shape = (-1, grouped.shape[1], -1, -1)
    out = _attend(grouped, keys[:, None].expand(shape), values[:, None].expand(shape), mask, params)
    return out.flatten(0, 1).transpose(0, 1)


class Part(Protocol):
    """Tokens of a step that attend together."""

    start: int
    stop: int

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams) -> Tensor:
        """Query (1, Q, N, D), key and value (1, H, N, D) of the N new tokens -> (N, Q, D)."""
        ...


_parts: ContextVar[Sequence[Part] | None] = ContextVar("loradeck_step", default=None)
_shapes: ContextVar[dict[int, LayerShape]] = ContextVar("loradeck_shapes")


@contextmanager
def step(parts: Sequence[Part]) -> Iterator[None]:
    """Within the block, a model whose attention is NAME reads one row (1, T) as these parts."""
    token = _parts.set(parts)
    try:
        yield
    finally:
        _parts.reset(token)


@contextmanager
def observed_shapes() -> Iterator[dict[int, LayerShape]]:
    """Collect what each layer stores of a token, by its index, from a forward of one token in the block."""
    shapes: dict[int, LayerShape] = {}
    token = _shapes.set(shapes)
    try:
        yield shapes
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
    unsupported = [name for name in UNSUPPORTED if settings.get(name) is not None]
    if unsupported:
        raise ValueError(f"its attention has the unsupported argument {unsupported[0]}")
    params = AttentionParams(settings.get("scaling"), settings.get("sliding_window"), settings.get("softcap"))
    outputs = []
    for part in parts:
        span = slice(part.start, part.stop)
        outputs.append(part.attend(layer, query[:, :, span], key[:, :, span], value[:, :, span], params))
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs))[None], None


def _attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, params: AttentionParams) -> Tensor:
    if params.softcap is None:
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=params.scale)
    scale = query.shape[-1] ** -0.5 if params.scale is None else params.scale
    scores = (query @ keys.transpose(-1, -2)).float() * scale
    scores = torch.tanh(scores / params.softcap) * params.softcap + mask
    return scores.softmax(-1).to(values.dtype) @ values


def _bias(distance: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
    """Return 0 where a token sees another one at this distance before it, and -inf elsewhere."""
    seen = distance >= 0
    if window is not None:
        seen &= distance < window
    return torch.zeros(distance.shape, dtype=dtype, device=distance.device).masked_fill_(~seen, float("-inf"))


def _no_mask(*_: Any, **__: Any) -> None:
    """Return None: which tokens see each other follows from the parts."""


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _no_mask)
