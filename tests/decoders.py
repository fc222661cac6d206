"""Tiny random decoders of every family that the compiled step computes, and of some that it refuses."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ROPE = {"rope_type": "default", "rope_theta": 100.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 48}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "llama-head-dim": ("llama", {"head_dim": 12, "num_key_value_heads": 1}),
    "llama-gelu": ("llama", {"hidden_act": "gelu"}),
    "mistral-window": ("mistral", {"sliding_window": 5, "head_dim": 8}),
    "mistral-full": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "gemma": ("gemma", {"head_dim": 16}),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 16,
            "sliding_window": 5,
            "layer_types": SLIDING,
            "query_pre_attn_scalar": 11,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "attn_implementation": "eager",
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 16,
            "sliding_window": 5,
            "layer_types": SLIDING,
            "query_pre_attn_scalar": 11,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 8.0},
            },
        },
    ),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.4,
            "logits_scaling": 8.0,
            "attention_bias": True,
        },
    ),
    "olmo2": ("olmo2", {}),
    "phi3": ("phi3", {"sliding_window": None}),
    "phi3-partial": (
        "phi3",
        {
            "sliding_window": 6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
        },
    ),
    "olmo3": ("olmo3", {"sliding_window": 5, "layer_types": SLIDING}),
    "vaultgemma": ("vaultgemma", {"head_dim": 16, "attn_implementation": "eager"}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1]}),
    "mixtral": ("mixtral", {"num_local_experts": 5}),
    "qwen3-moe": ("qwen3_moe", {**EXPERTS, "head_dim": 16, "norm_topk_prob": True}),
    "qwen3-moe-some": ("qwen3_moe", {**EXPERTS, "head_dim": 8, "mlp_only_layers": [1]}),
    "olmoe": ("olmoe", {**EXPERTS, "intermediate_size": 24}),
    "granite-moe": ("granitemoe", {"num_local_experts": 4, "residual_multiplier": 0.22, "attention_multiplier": 0.4}),
    "smollm3-window": (
        "smollm3",
        {"no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 4},
    ),
}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "gpt2": ("gpt2", {"n_embd": 32, "n_head": 4, "n_layer": 1, "vocab_size": 97}, "unknown part, `wte`"),
    "gpt-neox": ("gpt_neox", SIZES, "unknown part, `embed_in`"),
    "starcoder2": ("starcoder2", SIZES, "`model.norm` is no RMS norm"),
    "qwen2-moe": ("qwen2_moe", {**SIZES, **EXPERTS}, "`model.layers.0.mlp` has an unknown part, `shared_expert`"),
    "qwen3-moe-mixed": (
        "qwen3_moe",
        {**SIZES, **EXPERTS, "moe_intermediate_size": 24, "mlp_only_layers": [1]},
        "its layers have different intermediate sizes: 24, 48",
    ),
    "phimoe": ("phimoe", SIZES, "`model.norm` is no RMS norm"),
    "phi": ("phi", SIZES, "unknown part, `final_layernorm`"),
    "cohere": ("cohere", SIZES, "`model.norm` is no RMS norm"),
    "olmo": ("olmo", SIZES, "`model.norm` is no RMS norm"),
    "glm": ("glm", {**SIZES, "head_dim": 8}, "`model.layers.0` norms or turns its queries and keys in an unknown way"),
    "glm4": ("glm4", {**SIZES, "head_dim": 8}, "unknown part, `post_self_attn_layernorm`"),
    "gpt-oss": (
        "gpt_oss",
        {**SIZES, "head_dim": 8, "num_local_experts": 4, "attn_implementation": "eager", "rope_parameters": ROPE},
        "`model.rotary_emb` is not laid out",
    ),
    "dynamic": (
        "llama",
        {**SIZES, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}},
        r"depends on the length of the text \(dynamic\)",
    ),
    "longrope": (
        "phi3",
        {
            **SIZES,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 100.0,
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
                "original_max_position_embeddings": 16,
            },
        },
        r"depends on the length of the text \(longrope\)",
    ),
    "relu": ("llama", {**SIZES, "hidden_act": "relu"}, "`model.layers.0.mlp` has an unknown activation"),
    "both-ways": (
        "gemma3_text",
        {**SIZES, "head_dim": 8, "use_bidirectional_attention": True, "layer_types": SLIDING},
        "`model.layers.0.self_attn` lets a token see what follows it",
    ),
}


def build(kind: str, settings: dict[str, Any], dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of random weights; norms and biases too, which a fresh model has at one and zero."""
    implementation = settings.get("attn_implementation", "sdpa")
    config = AutoConfig.for_model(kind, **{key: settings[key] for key in settings if key != "attn_implementation"})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation, dtype=dtype)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model.eval().requires_grad_(False)


def text(count: int = 23, vocabulary: int = 97) -> Tensor:
    return torch.randint(3, vocabulary, (count,), generator=torch.Generator().manual_seed(1))
