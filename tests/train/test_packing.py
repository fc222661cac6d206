"""Packed sequences give what each gives alone, outputs and gradients, on every kind of base that can be packed."""

import threading
from collections.abc import Callable

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from loradeck.dataset.example import Example
from loradeck.native import varlen_attention
from loradeck.train.batching import collate
from loradeck.train.packing import NAME, can_pack, packed_sequences

SPECIALS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, **SPECIALS}
LLAMA_LIKE = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2}
MODELS: dict[str, Callable[[int], PreTrainedModel]] = {  # of heads of so many numbers
    "gpt2": lambda dim: GPT2LMHeadModel(
        GPT2Config(vocab_size=260, n_embd=4 * dim, n_layer=2, n_head=4, n_positions=64, **SPECIALS)
    ),
    "qwen3": lambda dim: Qwen3ForCausalLM(Qwen3Config(**LLAMA_LIKE, head_dim=dim)),
    "mistral, a window of 4": lambda dim: MistralForCausalLM(
        MistralConfig(**LLAMA_LIKE, head_dim=dim, sliding_window=4)
    ),
    "gemma3, a window of 4 in some layers": lambda dim: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **LLAMA_LIKE, head_dim=dim, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
        )
    ),
    "cohere": lambda dim: CohereForCausalLM(CohereConfig(**{**LLAMA_LIKE, "hidden_size": 4 * dim})),
}
OTHERS: dict[str, Callable[[], PreTrainedModel]] = {
    "bloom, whose attention has a bias": lambda: BloomForCausalLM(
        BloomConfig(vocab_size=260, hidden_size=32, n_layer=2, n_head=4, **SPECIALS)
    ),
    "mamba, which has a state": lambda: MambaForCausalLM(
        MambaConfig(vocab_size=260, hidden_size=32, num_hidden_layers=2, **SPECIALS)
    ),
    "gemma2, whose attention is capped, with heads that the C code does not take": lambda: capped(8),
}


in_c = pytest.mark.skipif(
    varlen_attention.why_not_available() is not None, reason=f"attention in C {varlen_attention.why_not_available()}"
)


def capped(dim: int) -> PreTrainedModel:
    return Gemma2ForCausalLM(Gemma2Config(**LLAMA_LIKE, head_dim=dim, sliding_window=4, attn_logit_softcapping=0.1))


def build(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval()


def packed_logits(model: PreTrainedModel, examples: list[Example]) -> torch.Tensor:
    batch = collate(examples, packed=True)
    with packed_sequences(model, batch.lengths):
        return model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits[0]


def test_a_sequence_does_not_see_its_neighbours(tiny: LlamaForCausalLM, random_examples: Callable) -> None:
    packing_changes_nothing(tiny, random_examples(5, 1))


@pytest.mark.parametrize("dim", [8, pytest.param(16, marks=in_c)])
@pytest.mark.parametrize("kind", MODELS)
def test_nor_on_other_kinds_of_base(kind: str, dim: int, random_examples: Callable) -> None:
    packing_changes_nothing(build(lambda: MODELS[kind](dim)), random_examples(5, 1))


@in_c
def test_nor_where_attention_is_capped(random_examples: Callable) -> None:
    packing_changes_nothing(build(lambda: capped(16)), random_examples(5, 1))


def packing_changes_nothing(model: PreTrainedModel, examples: list[Example]) -> None:
    assert can_pack(model)
    before = model.config._attn_implementation
    model.requires_grad_(True)
    logits = packed_logits(model, examples)
    assert model.config._attn_implementation == before
    alone = torch.cat([model(input_ids=torch.tensor([each.tokens]), use_cache=False).logits[0] for each in examples])
    torch.testing.assert_close(logits, alone, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    gradients = torch.autograd.grad(logits, [*model.parameters()], upstream, allow_unused=True)
    expected = torch.autograd.grad(alone, [*model.parameters()], upstream, allow_unused=True)
    for one, other in zip(gradients, expected, strict=True):
        if one is not None or other is not None:
            assert (one - other).abs().max() <= 1e-5 * other.abs().max()


def test_the_order_of_sequences_does_not_matter(tiny: LlamaForCausalLM, random_examples: Callable) -> None:
    examples = random_examples(4, 2)
    ends = torch.tensor([0, *(len(each.tokens) for each in examples)]).cumsum(0).tolist()
    logits = packed_logits(tiny, examples)
    reordered = packed_logits(tiny, examples[::-1])
    torch.testing.assert_close(reordered[-ends[1] :], logits[: ends[1]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", OTHERS)
def test_a_base_that_packing_would_change_is_not_packed(kind: str) -> None:
    assert not can_pack(build(OTHERS[kind]))


def test_half_precision_is_packed(tiny: LlamaForCausalLM) -> None:
    assert can_pack(tiny.to(torch.bfloat16))


def test_another_thread_is_not_affected(tiny: LlamaForCausalLM, random_examples: Callable) -> None:
    """The attention is replaced for the whole model, so it must behave as before for other threads."""
    ids = torch.tensor([[0, 0, 5, 6, 7], [3, 4, 5, 6, 7]])
    mask = (ids > 0).long()
    expected, seen = tiny(input_ids=ids, attention_mask=mask).logits, []

    def read() -> None:
        seen.append(tiny(input_ids=ids, attention_mask=mask).logits)

    with packed_sequences(tiny, [3, 4]):
        assert tiny.config._attn_implementation == NAME
        thread = threading.Thread(target=read)
        thread.start()
        thread.join()
    torch.testing.assert_close(seen[0][mask == 1], expected[mask == 1], rtol=1e-5, atol=1e-5)


def test_an_error_leaves_the_model_as_it_was(tiny: LlamaForCausalLM) -> None:
    with pytest.raises(KeyError), packed_sequences(tiny, [3]):
        raise KeyError
    assert tiny.config._attn_implementation == "sdpa"
