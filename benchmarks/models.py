"""The shapes of the bases that benchmarks/gpu.py builds, with the sizes of their config.json on the hub."""

from collections.abc import Callable
from functools import partial
from typing import Any

from transformers import LlamaConfig


def llama(factor: float | None = None, **sizes: Any) -> LlamaConfig:
    """A config of Llama 3; `factor` is that of its stretched positions."""
    rope: dict[str, Any] = {"rope_theta": 500000.0, "rope_type": "default"}
    if factor:
        stretch = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope |= {"rope_type": "llama3", "original_max_position_embeddings": 8192, **stretch}
    common: dict[str, Any] = {
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    }
    return LlamaConfig(rope_parameters=rope, **(common | sizes))


# The sizes are those of config.json in meta-llama/Llama-3.2-1B and meta-llama/Llama-3.1-8B.
SHAPES: dict[str, Callable[[], LlamaConfig]] = {
    "Llama-3.2-1B": partial(
        llama, 32.0, vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
    ),
    "Llama-3.1-8B": partial(
        llama, 8.0, vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, tie_word_embeddings=False,
    ),
    "tiny": partial(
        llama, vocab_size=260, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=256,
        bos_token_id=0, eos_token_id=1,
    ),
}  # fmt: skip
