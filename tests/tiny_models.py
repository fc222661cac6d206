"""Tiny models of several architectures, the same weights each time, and adapters that change what they say."""

from collections.abc import Callable

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from loradeck import Adapter, Bank, Base, LoraConfig
from loradeck.base.fingerprint import fingerprint

VOCABULARY, CONTEXT = 260, 256
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.2,  # wide enough that greedy text varies from prompt to prompt
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=16)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=CONTEXT, initializer_range=0.2,
            eos_token_id=2, bos_token_id=1,
        )
    ),
    "mistral, window": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=8)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=4)),
    "qwen3-moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SHAPE, **EXPERTS, head_dim=16, moe_intermediate_size=32, norm_topk_prob=True)
    ),
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**SHAPE, **EXPERTS)),
    "gemma2, soft cap": lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, head_dim=16, sliding_window=8)),
}  # fmt: skip
TARGETS = {"gpt2": ["c_attn", "c_fc"]}


def tiny_base(kind: str, tokenizer: PreTrainedTokenizerFast) -> Base:
    """Return a base of one of the MODELS."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MODELS[kind]().eval().requires_grad_(False)
    if kind.startswith("gemma2"):
        model.set_attn_implementation("eager")
    assert model.generation_config is not None
    model.generation_config.eos_token_id = 2
    return Base(model, tokenizer, "tiny", f"org/{kind}", fingerprint(model))


def adapter(model: PreTrainedModel, seed: int, r: int, targets: object = "all-linear") -> Adapter:
    """An adapter that changes what the model says."""
    bank = Bank(model)
    made = bank.add("made", LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    copy = Adapter.of(made.config, {path: made.pair(path) for path in made.sites})
    bank.detach()
    return copy
