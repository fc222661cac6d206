"""Fixtures for weight formats: a small model whose larger layers are worth packing."""

from collections.abc import Callable, Iterator

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from loradeck.base import blocked, prepacked, quantised


@pytest.fixture
def small() -> Callable[..., LlamaForCausalLM]:
    """Return a function that makes the same frozen model each time; its k and v are too small to be packed."""

    def small(dtype: torch.dtype = torch.float32, *, tied: bool = False, seed: int = 0) -> LlamaForCausalLM:
        config = LlamaConfig(
            vocab_size=260, hidden_size=256, intermediate_size=320, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.1, tie_word_embeddings=tied,
            bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)

    return small


@pytest.fixture
def fresh_checks() -> Iterator[None]:
    """Kernels are checked again in this test, and the results are dropped after it."""
    checks = (prepacked.why_not_packed, blocked.why_not_blocked, quantised.why_not_quantised)
    for check in checks:
        check.cache_clear()
    yield
    for check in checks:
        check.cache_clear()
