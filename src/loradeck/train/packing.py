"""Sequences packed end to end in one row, each of which sees only itself.

Padding is computed for nothing, and on ragged data it is much of a step. In a packed row only attention needs to know
where a sequence ends: positions begin anew, and the model's attention is replaced by one that goes sequence by
sequence. It needs no mask, because attention within a sequence is causal. On a CPU it runs in C, for heads of the sizes
that the C code takes.

T tokens of all sequences   D size of a head
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from loradeck.native import varlen_attention
from loradeck.ops.autograd import in_backward

NAME = "loradeck_packed"
LAYER_TYPES = {"full_attention", "sliding_attention"}  # transformers' layer types that `_attend` implements

_lengths: ContextVar[tuple[int, ...] | None] = ContextVar("loradeck_packed_lengths", default=None)
_active: list[tuple[int, ...]] = []  # for a backward pass that recomputes a layer in a thread of its own


@contextmanager
def packed_sequences(model: PreTrainedModel, lengths: Sequence[int]) -> Iterator[None]:
    """Within the block, the model reads one row (1, T) as sequences of these lengths.

    The caller gives it `position_ids` that begin anew with each sequence, and no attention mask. A backward pass that
    recomputes layers belongs inside the block. Other threads that use the model at the same time are not affected.
    """
    implementation = model.config._attn_implementation or "eager"
    lengths = tuple(lengths)
    token = _lengths.set(lengths)
    _active.append(lengths)
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(implementation)
        _active.remove(lengths)
        _lengths.reset(token)


@torch.no_grad()
def can_pack(model: PreTrainedModel) -> bool:
    """Return whether packed sequences give what each gives alone, by trying two.

    Models with recurrent state, with an attention bias or with attention code of their own do not.
    """
    config = model.config.get_text_config()
    if not model._can_set_attn_implementation():
        return False
    if model.config._attn_implementation not in ("sdpa", "eager", NAME):
        return False
    if not set(getattr(config, "layer_types", None) or LAYER_TYPES) <= LAYER_TYPES:
        return False
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (2, 5), generator=generator).to(model.device)
    lengths = [tokens.shape[1]] * 2
    try:
        alone = model(input_ids=tokens, use_cache=False).logits.flatten(0, 1)
        with packed_sequences(model, lengths):
            position_ids = positions(lengths).to(model.device)
            packed = model(input_ids=tokens.reshape(1, -1), position_ids=position_ids, use_cache=False).logits[0]
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False
    tolerance = 1e-4 if alone.dtype == torch.float32 else 5e-2
    return alone.shape == packed.shape and bool((alone - packed).abs().max() <= tolerance * alone.abs().max())


def positions(lengths: Sequence[int]) -> Tensor:
    """Return 0, 1, … for each sequence in turn, (1, T)."""
    return torch.cat([torch.arange(length) for length in lengths])[None]


def _current_lengths() -> tuple[int, ...] | None:
    lengths = _lengths.get()
    if lengths is None and in_backward() and len(_active) == 1:
        return _active[0]
    return lengths


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """Query (1, heads, T, D), key and value (1, key heads, T, D) -> (1, T, heads, D)."""
    lengths = _current_lengths()
    if lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    if any(settings.get(name) is not None for name in ("s_aux", "position_bias")):
        raise ValueError("this attention has an additional term")
    scale, window, softcap = (settings.get(name) for name in ("scaling", "sliding_window", "softcap"))
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if varlen_attention.takes(q, k, v):
        out = varlen_attention.varlen_attention(q, k, v, lengths, scale=scale, window=window, softcap=softcap)
        return out[None], None
    if softcap is not None:
        raise ValueError("this attention is capped")
    sequences = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = [_attend(*tensors, scale=scale, window=window) for tensors in sequences]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _attend(query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, window: int | None) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    length = query.shape[2]
    if window is None or length <= window:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
    distance = torch.arange(length, device=query.device)[:, None] - torch.arange(length, device=query.device)
    mask = (distance >= 0) & (distance < window)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped)


def _mask(*arguments: Any, **settings: Any) -> Tensor | None:
    return None if _current_lengths() is not None else sdpa_mask(*arguments, **settings)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
