"""The transformers configuration of a GGUF file, from its metadata.

The counterpart of `loradeck.gguf.metadata`. transformers' own takes ten seconds, because it reads the vocabulary, and
leaves RoPE's scaling, for one, as it is for another model.
"""

import math
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

from loradeck.base.gguf_file import HINT, GgufFile
from loradeck.errors import BaseModelError
from loradeck.llamacpp import EMBEDDING, FACTORS, HEAD, MODEL_TYPES, PLAIN, REORDERED

SIZES = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
OPTIONAL_SIZES = {"attention.head_count_kv": "num_key_value_heads", "attention.key_length": "head_dim"}
SETTINGS = {"context_length": "max_position_embeddings", "attention.layer_norm_rms_epsilon": "rms_norm_eps"}
WINDOW = {"attention.sliding_window": "sliding_window"}
OPTIONAL_SETTINGS = {
    "gemma2": {
        **WINDOW,
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    },
    "gemma3": WINDOW,
    "phi3": WINDOW,
    "granite": {
        "attention.scale": "attention_multiplier",
        "embedding_scale": "embedding_multiplier",
        "residual_scale": "residual_multiplier",
        "logit_scale": "logits_scaling",
    },
}
TOKENS = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
LARGEST = {"gemma2": 46, "gemma3": 62}  # layers of the 27B, whose attention is scaled by another rule
LOW, HIGH = 1, 4  # low_freq_factor and high_freq_factor of every Llama 3
TOLERANCE = 1e-4  # of a RoPE factor
LONGROPE = ("rope_factors_long.weight", "rope_factors_short.weight")


def why_no_config(file: GgufFile) -> str | None:
    """Return why `config_of` cannot read a file's architecture, or None if it can."""
    name = file.settings.get("general.architecture")
    if name == "olmo2" and file.settings.get("olmo2.attention.sliding_window"):
        return "its architecture is OLMo 3"  # under the same name
    return None if name in REORDERED | PLAIN else f"its architecture is {name}"


def config_of(file: GgufFile) -> PretrainedConfig:
    """Return a file's configuration; of an architecture that `why_no_config` has nothing against.

    Raises:
        BaseModelError: settings are missing, or cannot be those of the file's tensors.
    """
    if file.settings.get("general.type") == "adapter":
        raise BaseModelError(
            f"{file.path} is a LoRA file of llama.cpp, not a base",
            hint="Give its base here; `loradeck convert` makes the file an adapter's folder.",
        )
    name = file.settings["general.architecture"]
    problems: list[str] = []
    largest = max(size for tensor in file.tensors.values() for size in tensor.shape)

    def number(key: str, most: float, *, optional: bool = False) -> Any:
        value = file.settings.get(f"{name}.{key}")
        if value is None and optional:
            return None
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= most:
            problems.append(f"{name}.{key} is {'missing' if value is None else f'{value!r:.80}'}")
            return None
        return value

    values = {theirs: number(ours, largest) for ours, theirs in SIZES.items()}
    values |= {theirs: number(ours, largest, optional=True) for ours, theirs in OPTIONAL_SIZES.items()}
    values |= {theirs: number(ours, math.inf) for ours, theirs in SETTINGS.items()}
    names = OPTIONAL_SETTINGS.get(name, {})
    values |= {theirs: number(ours, math.inf, optional=True) for ours, theirs in names.items()}
    rotary = number("rope.dimension_count", largest, optional=True)
    theta = number("rope.freq_base", math.inf, optional=True) or 10_000.0
    if EMBEDDING not in file.tensors:
        problems.append(f"{EMBEDDING} is missing")
    if problems:
        raise BaseModelError(f"{file.path} does not say what model it is", problems, hint=HINT)
    values = {key: value for key, value in values.items() if value is not None}
    values.setdefault("num_key_value_heads", values["num_attention_heads"])
    values |= {theirs: file.settings.get(f"tokenizer.ggml.{ours}_token_id") for ours, theirs in TOKENS.items()}
    head_dim = values.get("head_dim") or values["hidden_size"] // max(1, values["num_attention_heads"])
    if name in LARGEST:
        is_largest = values["num_hidden_layers"] == LARGEST[name]
        values["query_pre_attn_scalar"] = (
            values["hidden_size"] / values["num_attention_heads"] if is_largest else head_dim
        )
    if name == "phi3":
        values["sliding_window"] = values.get("sliding_window") or None  # 0 is none
    rope = _rope(file, name, theta, head_dim, values)
    if rotary and rotary < head_dim:
        rope["partial_rotary_factor"] = rotary / head_dim
    if name == "gemma3":
        local = file.settings.get("gemma3.rope.freq_base_swa", 10_000.0)
        rope = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": local}}
    return AutoConfig.for_model(
        MODEL_TYPES.get(name, name),
        **values,
        rope_parameters=rope,
        vocab_size=file.tensors[EMBEDDING].shape[0],
        tie_word_embeddings=HEAD not in file.tensors,
    )


def _rope(file: GgufFile, name: str, theta: float, head_dim: int, values: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters of a file's RoPE.

    Raises:
        BaseModelError: its scaling is not known.
    """
    kind = file.settings.get(f"{name}.rope.scaling.type", "none")
    factor = file.settings.get(f"{name}.rope.scaling.factor", 1.0)
    original = file.settings.get(f"{name}.rope.scaling.original_context_length")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if kind == "linear":
        rope |= {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        rope |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    elif LONGROPE[0] in file.tensors:
        long, short = (file.values(file.tensors[each]).flatten().tolist() for each in LONGROPE)
        rope |= {"rope_type": "longrope", "long_factor": long, "short_factor": short}
        rope["original_max_position_embeddings"] = values["original_max_position_embeddings"] = original
    elif FACTORS in file.tensors:
        rope |= _llama3(file, theta, head_dim)
    elif kind != "none":
        raise BaseModelError(f"{file.path} scales its RoPE in an unknown way, {kind!r:.80}", hint=HINT)
    return rope


def _llama3(file: GgufFile, theta: float, head_dim: int) -> dict[str, Any]:
    """Return the settings of llama3's RoPE that divide its frequencies by a file's factors.

    Raises:
        BaseModelError: none do.
    """
    factors = file.values(file.tensors[FACTORS]).flatten().double()
    frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    factor = float(factors.max())
    if len(factors) == len(frequencies) and factor > 1:
        smooth = (1 / factors - 1 / factor) / (1 - 1 / factor)
        between = (smooth > TOLERANCE) & (smooth < 1 - TOLERANCE)
        waves = smooth[between] * (HIGH - LOW) + LOW
        context = round(float((waves * 2 * math.pi / frequencies[between]).mean())) if between.any() else 0
        waves = context * frequencies / (2 * math.pi)
        smooth = ((waves - LOW) / (HIGH - LOW)).clamp(0, 1)
        expectation = 1 / ((1 - smooth) / factor + smooth)
        if torch.allclose(factors, expectation, rtol=TOLERANCE):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": float(LOW),
                "high_freq_factor": float(HIGH),
                "original_max_position_embeddings": context,
            }
    raise BaseModelError(f"{file.path} has a {FACTORS} unlike that of Llama 3", hint="Load another file of this model.")
