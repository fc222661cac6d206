"""Adapters that PEFT trains on a base whose vocabulary was resized, with the tokenizer that has the new tokens."""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from tests.tiny_models import SHAPE
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

ADDED = ["<red>", "<green>", "<blue>"]  # the first has an id that the tiny base has a row for; the others have not
RED, GREEN, BLUE = 259, 260, 261
ROWS = SHAPE["vocab_size"]
LAYERS = ["q_proj", "down_proj"]
FAMILIES: Mapping[str, Callable[[bool], PreTrainedModel]] = {
    "llama": lambda tied: LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=tied)),
    "qwen2": lambda tied: Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=tied)),
    "gemma2": lambda tied: Gemma2ForCausalLM(Gemma2Config(**SHAPE, head_dim=16, tie_word_embeddings=tied)),
}
KINDS: Mapping[str, dict[str, Any]] = {
    "both trained": {"target_modules": LAYERS, "modules_to_save": ["embed_tokens", "lm_head"]},
    "embedding trained": {"target_modules": LAYERS, "modules_to_save": ["embed_tokens"]},
    "tied, trained": {"target_modules": LAYERS, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "copies": {"target_modules": LAYERS},
    "pairs": {"target_modules": [*LAYERS, "embed_tokens", "lm_head"]},
    "pair of the embedding": {"target_modules": [*LAYERS, "embed_tokens"]},
    "tied pairs": {"target_modules": [*LAYERS, "embed_tokens"], "ensure_weight_tying": True},
}


def save_base(folder: Path, family: str, *, tied: bool, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Write the files of a tiny base."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = FAMILIES[family](tied).eval()
    assert model.generation_config is not None
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def with_tokens(tokenizer: PreTrainedTokenizerFast, tokens: list[str] = ADDED) -> PreTrainedTokenizerFast:
    """Return a copy of a tokenizer with more tokens."""
    copy = PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str()),
        **{name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token", "chat_template")},
    )
    copy.add_tokens(tokens)
    return copy


def resized(base: Path, *, rows: int = ROWS + 2, seed: int = 1, **settings: Any) -> PreTrainedModel:
    """Return a base with more rows, whose values are large enough to tell them apart."""
    model = FAMILIES[_family(base)](False).from_pretrained(base).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.resize_token_embeddings(rows, mean_resizing=False, **settings)
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            with torch.no_grad():
                module.weight[ROWS:].normal_(std=0.4)
    return model


def adapted(base: Path, kind: str, *, seed: int = 1, **settings: Any) -> peft.PeftModel:
    """Return a resized base with an adapter of one of KINDS, which changes what it says."""
    config = peft.LoraConfig(r=3, lora_alpha=4, task_type="CAUSAL_LM", **KINDS[kind])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of bases that are not tied, and of tied ones that are adapted
        model = peft.get_peft_model(resized(base, seed=seed, **settings), config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "original_module" not in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def save(model: peft.PeftModel, folder: Path, tokenizer: PreTrainedTokenizerFast | None = None) -> Path:
    """Write an adapter, and its tokenizer, as PEFT does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says that it saves the embedding too
        model.save_pretrained(str(folder))
    if tokenizer is not None:
        with_tokens(tokenizer).save_pretrained(folder)
    return folder


def load(base: Path, folder: Path, *, trainable: bool = False) -> peft.PeftModel:
    """Return an adapter on another resized base, whose new rows have other values."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(resized(base, seed=9), str(folder), is_trainable=trainable).eval()


def _family(base: Path) -> str:
    return next(name for name in FAMILIES if name in (base / "config.json").read_text())


@torch.no_grad()
def say(model: peft.PeftModel, ids: list[int], token: int) -> None:
    """Let the model of "copies" continue a prompt with an added token: its row is twice that of the likeliest one."""
    head = model.get_output_embeddings()
    likeliest = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
    head.weight[token] = 2 * head.weight[likeliest]


@torch.no_grad()
def greedy(model: peft.PeftModel, ids: list[int], count: int) -> list[int]:
    """Return the tokens that follow, as transformers' generate finds them."""
    tokens = torch.tensor([ids])
    output = model.generate(
        input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return output[0, len(ids) :].tolist()
