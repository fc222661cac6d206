"""Documents laid end to end as one row, each seeing only itself. Knows attention; knows no adapters and no losses.

Padding computes what is thrown away, and on ragged data that is much of a step. Packed, only attention knows where a
document ends: positions begin anew, and the model's attention is replaced by one that goes document by document, which
needs no mask, because causal attention within a document is all there is.

T tokens of all documents   D width of a head
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from loradeck.ops.autograd import in_backward

NAME = "loradeck_packed"
# Per layer kind, transformers tells a mask from a rule; these two are the rules that `_attend` knows.
KINDS = {"full_attention", "sliding_attention"}

_lengths: ContextVar[tuple[int, ...] | None] = ContextVar("loradeck_documents", default=None)
_open: list[tuple[int, ...]] = []  # for a backward pass that recomputes a layer in a thread of its own


@contextmanager
def documents(model: PreTrainedModel, lengths: Sequence[int]) -> Iterator[None]:
    """Let a model read one row (1, T) as documents of so many tokens each, until the block ends.

    Give it `position_ids` that begin anew with each document, and no attention mask. A backward pass that computes
    layers again belongs inside the block. Other threads that use the model meanwhile are not concerned.
    """
    before = model.config._attn_implementation or "eager"
    own = tuple(lengths)
    token = _lengths.set(own)
    _open.append(own)
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        _open.remove(own)
        _lengths.reset(token)


@torch.no_grad()
def packable(model: PreTrainedModel) -> bool:
    """Say whether packed documents give what each gives alone, by trying two of them.

    Models with a state besides attention, with a bias of their own or attention they compute themselves do not.
    """
    config = model.config.get_text_config()
    if not (model._can_set_attn_implementation() and model._supports_sdpa) or model.config._attn_implementation not in (
        "sdpa",
        NAME,
    ):
        return False
    if not set(getattr(config, "layer_types", None) or KINDS) <= KINDS:
        return False
    chance = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (2, 5), generator=chance).to(model.device)
    lengths = [tokens.shape[1]] * 2
    try:
        alone = model(input_ids=tokens, use_cache=False).logits.flatten(0, 1)
        with documents(model, lengths):
            places = positions(lengths).to(model.device)
            packed = model(input_ids=tokens.reshape(1, -1), position_ids=places, use_cache=False).logits[0]
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False
    rounding = 1e-4 if alone.dtype == torch.float32 else 5e-2
    return alone.shape == packed.shape and bool((alone - packed).abs().max() <= rounding * alone.abs().max())


def _documents() -> tuple[int, ...] | None:
    own = _lengths.get()
    if own is None and in_backward() and len(_open) == 1:
        return _open[0]
    return own


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """Query (1, heads, T, D), key and value (1, key heads, T, D) -> (1, T, heads, D)."""
    lengths = _documents()
    if lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    if any(settings.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise ValueError("this attention has a term of its own")
    window = settings.get("sliding_window")
    parts = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    own = [_attend(*part, scale=settings.get("scaling"), window=window) for part in parts]
    return torch.cat(own, dim=2).transpose(1, 2), None


def _attend(query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, window: int | None) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    length = query.shape[2]
    if window is None or length <= window:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
    distance = torch.arange(length, device=query.device)[:, None] - torch.arange(length, device=query.device)
    mask = (distance >= 0) & (distance < window)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped)


def _mask(*arguments: Any, **settings: Any) -> Tensor | None:
    return None if _documents() is not None else sdpa_mask(*arguments, **settings)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


def positions(lengths: Sequence[int]) -> Tensor:
    """Return 0, 1, … for each document in turn, (1, T)."""
    return torch.cat([torch.arange(length) for length in lengths])[None]


def spans(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield where each document begins and ends."""
    ends = [0]
    for length in lengths:
        ends.append(ends[-1] + length)
    yield from pairwise(ends)
