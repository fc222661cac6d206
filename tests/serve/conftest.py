"""Tiny bases of several shapes, and a store of tiny adapters that change what they say."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tests.tiny_models import TARGETS, VOCABULARY, adapter

from loradeck import AdapterStore, Bank, Base
from loradeck.sampling import Token
from loradeck.serve.config import EngineConfig
from loradeck.serve.engine import Engine


@pytest.fixture(autouse=True)
def small_tensors(one_thread: None) -> None:
    """Every test here computes on one thread."""


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

    def serve(observer: object = None, draft_model: Base | None = None, **bounds: object) -> Engine:
        config = EngineConfig(**{"max_rows": 4, "max_step_tokens": 16, **bounds})  # type: ignore[arg-type]
        made.append(Engine(base, store, config, draft_model=draft_model, observer=observer))  # type: ignore[arg-type]
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
