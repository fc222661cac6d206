"""Tiny bases of several shapes, and a store of tiny adapters that change what they say."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
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
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from loradeck import Adapter, AdapterStore, Bank, Base, LoraConfig
from loradeck.base.fingerprint import fingerprint
from loradeck.sampling import Token
from loradeck.serve.config import EngineConfig
from loradeck.serve.engine import Engine

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
    "gemma2, soft cap": lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, head_dim=16, sliding_window=8)),
}  # fmt: skip
TARGETS = {"gpt2": ["c_attn", "c_fc"]}


@pytest.fixture(autouse=True)
def small_tensors(one_thread: None) -> None:
    """Every test here computes on one thread."""


@pytest.fixture
def make(tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[[str], Base]:
    """Return a function that makes a base of a shape, the same weights each time."""

    def make(kind: str) -> Base:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = MODELS[kind]().eval().requires_grad_(False)
        if kind.startswith("gemma2"):
            model.set_attn_implementation("eager")
        assert model.generation_config is not None
        model.generation_config.eos_token_id = 2
        return Base(model, tiny_tokenizer, "tiny", f"org/{kind}", fingerprint(model))

    return make


@pytest.fixture
def base(make: Callable[[str], Base]) -> Base:
    return make("llama")


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


def fill(store: AdapterStore, base: Base, kind: str = "llama", count: int = 4) -> AdapterStore:
    """Publish a0, a1, … of ranks 2, 3, …"""
    for i in range(count):
        store.publish(f"a{i}", adapter(base.model, i, 2 + i, TARGETS.get(kind, "all-linear")))
    return store


@pytest.fixture
def store(tmp_path: Path, base: Base) -> AdapterStore:
    return fill(AdapterStore(tmp_path / "store"), base)


@pytest.fixture
def serve(base: Base, store: AdapterStore) -> Iterator[Callable[..., Engine]]:
    """Return a function that makes an engine with these bounds; all are closed at the end."""
    made: list[Engine] = []

    def serve(observer: object = None, **bounds: object) -> Engine:
        config = EngineConfig(**{"max_rows": 4, "max_step_tokens": 16, **bounds})  # type: ignore[arg-type]
        made.append(Engine(base, store, config, observer=observer))  # type: ignore[arg-type]
        return made[-1]

    yield serve
    for engine in made:
        engine.close()


def until(condition: Callable[[], bool]) -> bool:
    """Whether a condition holds within two minutes."""
    end = time.monotonic() + 120
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.002)
    return True


def ids(tokens: Iterable[Token]) -> list[int]:
    return [token.id for token in tokens]


def prompts(count: int, *, seed: int = 0, longest: int = 70) -> list[list[int]]:
    """Prompts of many lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


@contextmanager
def alone(base: Base, store: AdapterStore | None, entry: object, *, trainable: bool = False) -> Iterator[None]:
    """The base's own model, nothing of an engine in it, through the adapters of a route's entry."""
    bank = Bank(base.model)
    weights = {entry: 1.0} if isinstance(entry, str) else dict(entry or {})  # type: ignore[call-overload]
    route = {}
    for i, (spec, weight) in enumerate(weights.items()):
        assert store is not None
        route[bank.load(store.find(spec).path, f"x{i}", trainable=trainable)] = weight
    try:
        with bank.route(route or None):
            yield
    finally:
        bank.detach()


@torch.no_grad()
def greedy(
    base: Base, store: AdapterStore | None, prompt: list[int], entry: object = None, length: int = 16
) -> list[int]:
    """What transformers' generate continues a prompt with, alone."""
    tokens = torch.tensor([prompt])
    with alone(base, store, entry):
        out = base.model.generate(  # type: ignore[operator]
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=length, do_sample=False, pad_token_id=0
        )
    return out[0, len(prompt) :].tolist()


@torch.no_grad()
def logprobs(base: Base, store: AdapterStore | None, tokens: list[int], entry: object = None) -> torch.Tensor:
    """The log-probabilities (T, V) of what follows each token, from one plain forward."""
    with alone(base, store, entry):
        return base.model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)
