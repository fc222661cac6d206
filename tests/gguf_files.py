"""Tiny GGUF files of several architectures and of every type of block."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GraniteConfig,
    LlamaConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

import gguf
from loradeck.gguf.model import Merge, Model, export

SHAPE = {
    "vocab_size": 260,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GRANITE = {"attention_multiplier": 0.1, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "llama, tied": lambda: LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=64),
    "gemma": lambda: GemmaConfig(**SHAPE, head_dim=64),
    "gemma2": lambda: Gemma2Config(**SHAPE, head_dim=64, query_pre_attn_scalar=64, sliding_window=8),
    "gemma3": lambda: Gemma3TextConfig(**SHAPE, head_dim=64, query_pre_attn_scalar=64, sliding_window=8),
    "phi3": lambda: Phi3Config(**SHAPE),
    "phi3, partial": lambda: Phi3Config(**SHAPE, partial_rotary_factor=0.5),
    "granite": lambda: GraniteConfig(**SHAPE, **GRANITE),
    "olmo2": lambda: Olmo2Config(**SHAPE),
    "smollm3": lambda: SmolLM3Config(**SHAPE),
}
# Where the scales of a block are: half floats, or the exponent of MXFP4.
SCALES = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "IQ4_NL": [0], "IQ4_XS": [0],
    "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "MXFP4": [],
}  # fmt: skip


def model_of(kind: str) -> PreTrainedModel:
    """Return a model of one of the CONFIGS, the same weights each time; none of its vectors is all ones or zeros."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[kind]()).eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def write(kind: str, quant: str, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Path:
    """Return a GGUF file of one of the CONFIGS in one type, and leave the plain model beside it."""
    model_of(kind).save_pretrained(folder / "plain")
    tokenizer.save_pretrained(folder / "plain")
    export(Model.open(str(folder / "plain")), Merge(), folder / "tiny.gguf", quant)
    return folder / "tiny.gguf"


def blocks(kind: str, rows: int, inputs: int, seed: int) -> np.ndarray:
    """Return random blocks of a type, whose values are small numbers."""
    size, width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    random = np.random.default_rng(seed)
    data = random.integers(0, 256, (rows * inputs // size, width), dtype=np.uint8)
    if kind == "MXFP4":
        data[:, 0] = random.integers(118, 122, len(data))
    for at in SCALES[kind]:
        largest = 0.0005 if kind.endswith("_K") or kind == "IQ4_XS" else 0.01
        data[:, at : at + 2] = random.normal(0, largest, (len(data), 1)).astype(np.float16).view(np.uint8)
    return data.reshape(rows, -1)


def rewrite(
    file: Path,
    new: Path,
    *,
    tensor: Callable[[str, np.ndarray, str], tuple[str, np.ndarray, str] | None] = lambda *each: each,
    settings: Mapping[str, object] = MappingProxyType({}),
) -> Path:
    """Copy a file with some tensors (name, data, type) and settings changed.

    A tensor for which None is returned is left out, and so is a setting that is None.
    """
    reader = gguf.GGUFReader(file)
    name = reader.get_field("general.architecture").contents()
    writer = gguf.GGUFWriter(new, name)
    for key, field in reader.fields.items():
        value = settings.get(key, field.contents())
        if key.startswith("GGUF.") or key == "general.architecture" or value is None:
            continue
        kind = gguf.GGUFValueType.STRING if isinstance(value, str) else field.types[0]
        writer.add_key_value(key, value, kind, sub_type=field.types[-1] if len(field.types) > 1 else None)
    for key, value in settings.items():
        if key not in reader.fields and value is not None:
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    for each in reader.tensors:
        change = tensor(each.name, each.data, each.tensor_type.name)
        if change is not None:
            writer.add_tensor(change[0], change[1], raw_dtype=gguf.GGMLQuantizationType[change[2]])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return new
