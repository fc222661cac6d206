"""A model's settings as llama.cpp reads them, from its transformers configuration.

Written as conversion/ in llama.cpp does. What llama.cpp does not read, or fixes in its code, is checked.
"""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from loradeck.errors import UnsupportedError
from loradeck.llamacpp import GEMMA, Architecture

if TYPE_CHECKING:
    from gguf import GGUFWriter

WINDOWED = frozenset({"gemma2", "gemma3", "phi3"})  # llama.cpp has a sliding window for these
EVERY = {"gemma2": 2, "gemma3": 6}  # in llama.cpp's code: every n-th layer attends to everything
ROPE_TYPES = ("default", "linear", "llama3")
ACTIVATIONS = dict.fromkeys(GEMMA, ("gelu_pytorch_tanh",))
LOCAL_THETA = 10_000.0  # the RoPE base of gemma3's windowed layers, in llama.cpp's code
SMOLLM3_INTERVAL = 4  # in llama.cpp's code: every fourth layer has no RoPE


def check(config: PretrainedConfig, base: Architecture) -> None:
    """Refuse settings that llama.cpp would ignore.

    Raises:
        UnsupportedError: with each of them.
    """
    rope = _rope(config)
    kinds = getattr(config, "layer_types", None) or []
    every = EVERY.get(base.name)
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    local = (getattr(config, "rope_parameters", None) or {}).get("sliding_attention", {})
    wrong = {
        "rope_type": rope.get("rope_type", "default") not in ROPE_TYPES and rope["rope_type"],
        "hidden_act": activation not in ACTIVATIONS.get(base.name, ("silu",)) and activation,
        "layer_types": every
        and any((kind == "full_attention") != ((at + 1) % every == 0) for at, kind in enumerate(kinds))
        and kinds,
        "query_pre_attn_scalar": base.name in EVERY
        and config.query_pre_attn_scalar != _head_dim(config, base)
        and config.query_pre_attn_scalar,
        "rope_local_base_freq": local.get("rope_theta", LOCAL_THETA) != LOCAL_THETA and local.get("rope_theta"),
        "no_rope_layer_interval": base.name == "smollm3"
        and config.no_rope_layer_interval != SMOLLM3_INTERVAL
        and config.no_rope_layer_interval,
        "use_bidirectional_attention": getattr(config, "use_bidirectional_attention", False),
    }
    problems = [f"{name}={value!r:.80}" for name, value in wrong.items() if value]
    if problems:
        raise UnsupportedError(f"llama.cpp's {base.name} has no such setting", problems)


def add_settings(writer: "GGUFWriter", config: PretrainedConfig, base: Architecture) -> None:
    """Add a model's settings to a file."""
    rope = _rope(config)
    window = getattr(config, "sliding_window", None)
    context = config.max_position_embeddings
    head_dim = _head_dim(config, base)
    writer.add_context_length(context if not window or base.name in WINDOWED else min(context, window))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(base.heads)
    writer.add_head_count_kv(base.kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1)))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if base.name in WINDOWED:
        writer.add_sliding_window(window or 0)
    if base.name == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if base.name == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)


def rope_factors(config: PretrainedConfig, base: Architecture) -> Tensor | None:
    """Return what llama3's RoPE divides each frequency by, a tensor of llama.cpp's files; None for other RoPEs.

    As `_compute_llama3_parameters` in transformers/modeling_rope_utils.py.
    """
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return None
    size = _head_dim(config, base)
    frequencies = rope["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    waves = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # in the original context
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = ((waves - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()


def _rope(config: PretrainedConfig) -> dict[str, Any]:
    parameters: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    return parameters.get("full_attention", parameters)


def _head_dim(config: PretrainedConfig, base: Architecture) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // base.heads
