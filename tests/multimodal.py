"""Tiny random models of multimodal families, as transformers saves whole checkpoints of them."""

import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

VOCABULARY = 260  # of the tiny tokenizer, and one more
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS = {"head_dim": 8}
MROPE = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [1, 1, 2]}
VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
SIGLIP = {**VISION, "model_type": "siglip_vision_model"}
PIXTRAL = {**VISION, "model_type": "pixtral"}
CLIP = {**VISION, "model_type": "clip_vision_model", "projection_dim": 8}
QWEN = {"depth": 1, "num_heads": 2, "patch_size": 4, "out_hidden_size": 32, "intermediate_size": 24}
QWEN_2 = {**QWEN, "hidden_size": 16, "fullatt_block_indexes": [0]}
QWEN_3 = {**QWEN, "hidden_size": 16, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
LINEAR_ATTENTION = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
GEMMA_4 = {
    "global_head_dim": 8, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"], "vocab_size_per_layer_input": VOCABULARY,
}  # fmt: skip
LLAMA_4 = {
    "intermediate_size_mlp": 48, "num_local_experts": 4, "interleave_moe_layer_step": 2, "attention_chunk_size": 32,
}  # fmt: skip
LLAMA_4_VISION = {
    "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14, "projector_input_dim": 16, "projector_output_dim": 16, "vision_output_dim": 16,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2-vl": ("qwen2_vl", {
        "text_config": {**SIZES, "rope_parameters": MROPE},
        "vision_config": {"depth": 1, "num_heads": 2, "patch_size": 4, "embed_dim": 16, "hidden_size": 32},
    }),
    "qwen2.5-vl": ("qwen2_5_vl", {"text_config": {**SIZES, "rope_parameters": MROPE}, "vision_config": QWEN_2}),
    "qwen3-vl": ("qwen3_vl", {"text_config": {**SIZES, **HEADS, "rope_parameters": MROPE}, "vision_config": QWEN_3}),
    "qwen3.5": ("qwen3_5", {"text_config": {**SIZES, **HEADS, **LINEAR_ATTENTION}, "vision_config": QWEN_3}),
    "gemma3": ("gemma3", {
        "text_config": {**SIZES, **HEADS, "sliding_window": 8, "query_pre_attn_scalar": 8}, "vision_config": SIGLIP, "mm_tokens_per_image": 4,
    }),
    "gemma4": ("gemma4", {"text_config": {**SIZES, **HEADS, **GEMMA_4}, "vision_config": {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8,
        "num_key_value_heads": 2, "patch_size": 4,
    }, "audio_config": None}),
    "llava": ("llava", {"text_config": {"model_type": "llama", **SIZES}, "vision_config": CLIP}),
    "mistral3": ("mistral3", {"text_config": {"model_type": "mistral", **SIZES}, "vision_config": PIXTRAL}),
    "llama4": ("llama4", {"text_config": {**SIZES, **HEADS, **LLAMA_4}, "vision_config": LLAMA_4_VISION}),
}  # fmt: skip

# Loaded by the same rules; their language models lie under names of their own, or are another family's.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "idefics3": ("idefics3", {"text_config": {"model_type": "llama", **SIZES}, "vision_config": VISION}),
    "llava-next": ("llava_next", {"text_config": {"model_type": "qwen2", **SIZES}, "vision_config": CLIP}),
}

# Of each family: the name in the table of docs/adapters.md, and what it says of load, serve and export.
SUPPORT = {
    "qwen2-vl": ("Qwen 2-VL", "Qwen2ForCausalLM", "compiled step", "model"),
    "qwen2.5-vl": ("Qwen 2.5-VL", "Qwen2ForCausalLM", "compiled step", "model"),
    "qwen3-vl": ("Qwen 3-VL", "Qwen3ForCausalLM", "compiled step", "model"),
    "qwen3.5": ("Qwen 3.5", "Qwen3_5ForCausalLM", "no: `generate` and `chat` do", "no"),
    "gemma3": ("Gemma 3", "Gemma3ForCausalLM", "compiled step", "model, adapter"),
    "gemma4": ("Gemma 4", "Gemma4ForCausalLM", "transformers' modules", "no"),
    "llava": ("LLaVA", "LlamaForCausalLM", "compiled step", "model"),
    "mistral3": ("Mistral 3", "MistralForCausalLM", "compiled step", "model"),
    "llama4": ("Llama 4", "Llama4ForCausalLM", "transformers' modules", "no"),
}


def whole(family: str) -> PreTrainedModel:
    """A whole model, with vision; the same weights each time."""
    kind, settings = (FAMILIES | OTHERS)[family]
    config = AutoConfig.for_model(kind, **settings)
    name = transformers.models.auto.modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, name)(config)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)


def adapted(family: str, folder: Path, seed: int = 0, **settings: object) -> PeftModel:
    """The whole model with an adapter in PEFT that changes its text; it is saved in a folder."""
    targets = r".*language_model.*\.(q_proj|v_proj|down_proj)"
    settings = {"r": 4, "lora_alpha": 8, "target_modules": targets, **settings}
    generator = torch.Generator().manual_seed(seed)
    with warnings.catch_warnings(), torch.no_grad():  # what PEFT says of its own doings is not our matter here
        warnings.simplefilter("ignore")
        model = get_peft_model(whole(family), LoraConfig(**settings, init_lora_weights=False))  # type: ignore[arg-type]
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        model.save_pretrained(folder)
    assert isinstance(model, PeftModel)
    return model.eval()


@torch.no_grad()
def text_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits of a whole model, also of one in PEFT, for text: ids (rows, tokens) -> (rows, tokens, vocabulary)."""
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if type(inner).__name__.startswith("Llama4"):  # transformers 5.24 computes the whole one with images only
        inner = inner.language_model
    logits: Tensor = inner(input_ids=ids).logits
    return logits
