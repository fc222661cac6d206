"""What models are given to do: requests and when they come, texts, forward passes and training steps."""

import importlib
import inspect
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig

from loradeck import Bank, Base
from loradeck.dataset.example import Example
from loradeck.dataset.record import Completion
from loradeck.train.config import TrainConfig
from loradeck.train.events import AnyEvent, Step
from loradeck.train.trainer import Trainer

RATE = 1e-4
LONGEST = 512  # tokens of an example
PROMPT = 64
PASSES = {
    "decode, 1 row": (1, 1),
    "decode, 16 rows": (16, 1),
    "prefill, 1 x 512": (1, 512),
    "prefill, 16 x 64": (16, 64),
}
"""(rows, new tokens)."""
MODULES = (
    "argparse bisect calendar collections csv datetime difflib fractions functools heapq inspect json os pathlib "
    "random re shutil statistics string tempfile textwrap zipfile"
)


# ---- requests


def popularity(kind: str, requests: int) -> list[int]:
    """Return each request's adapter, as Punica draws them (benchmark_utils.get_lora_lens).

    identical: one for all · distinct: one each · uniform: √requests of them, equally · zipf:1.5: 1, 1, 2, 3, 5, …
    """
    counts: list[int]
    if kind == "identical":
        counts = [requests]
    elif kind == "distinct":
        counts = [1] * requests
    elif kind == "uniform":
        adapters = math.ceil(math.sqrt(requests))
        counts = [requests // adapters + (i < requests % adapters) for i in range(adapters)]
    else:
        base = float(kind.removeprefix("zipf:"))
        counts = []
        while sum(counts) < requests:
            counts.append(min(math.floor(base ** len(counts)), requests - sum(counts)))
        counts.sort(reverse=True)
    adapters = [adapter for adapter, count in enumerate(counts) for _ in range(count)]
    random.Random(0xABCDABCD987).shuffle(adapters)
    return adapters


@dataclass(frozen=True)
class Arrival:
    """A request of a trace."""

    at: float
    """Seconds after the trace's start."""
    adapter: int
    prompt: int
    """Tokens; so is `answer`."""
    answer: int


def trace(
    *, adapters: int, rate: float, seconds: float, alpha: float = 1.0, cv: float = 1.0, low: int = 8, high: int = 64
) -> list[Arrival]:
    """Return S-LoRA's trace: gaps from a Gamma distribution, adapters by a power law, lengths uniform; seed 42."""
    rng = np.random.default_rng(42)
    count = int(rate * seconds)
    numbers = (rng.power(alpha, count) * adapters).astype(int)
    times = np.cumsum(rng.gamma(1 / cv**2, cv**2 / rate, count))
    lengths = rng.integers(low, high, (count, 2))
    return [
        Arrival(float(at), int(adapter), int(prompt), int(answer))
        for at, adapter, (prompt, answer) in zip(times, numbers, lengths, strict=True)
    ]


# ---- texts


def docstring_examples(base: Base) -> list[Example]:
    """Return questions about functions of Python's library, with their docstrings as answers."""
    records = [
        Completion(
            f"What does Python's {module}.{name}({', '.join(inspect.signature(function).parameters)}) do?",
            inspect.cleandoc(text),
        )
        for module in MODULES.split()
        for name, function in inspect.getmembers(importlib.import_module(module), inspect.isfunction)
        if function.__module__ == module and not name.startswith("_") and (text := function.__doc__)
    ]
    return [Example.of(record, base.tokenizer, LONGEST) for record in records]


# ---- forward passes, and transformers' generate


def cache_name(model: nn.Module) -> str:
    """Return what a model of transformers calls its KV cache; version 5 changed the name."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


def forward_pass(model: Any, rows: int, tokens: int) -> Callable[[], object]:
    """Return a forward pass: a decode step after a prompt of 64 if `tokens` is 1, else a prefill for last logits."""
    ids = torch.randint(0, 1000, (rows, max(tokens, PROMPT)), generator=torch.Generator().manual_seed(0))
    prefill = partial(model, input_ids=ids, use_cache=True, logits_to_keep=1)
    if tokens > 1:
        return prefill
    name = cache_name(model)
    cache = prefill()[name]

    def step() -> None:
        model(input_ids=ids[:, :1], use_cache=True, **{name: cache})
        cache.crop(-1)

    return step


@torch.inference_mode()
def greedy(model: Any, prompts: Sequence[Sequence[int]], tokens: int, **settings: Any) -> None:
    """Continue prompts by this many tokens with transformers' `generate`."""
    ids = torch.tensor(prompts)
    config = GenerationConfig(
        max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=2
    )
    model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config, **settings)


# ---- training


def training_steps(
    base: Base, adapter: Path, datasets: Sequence[Sequence[Example]], batch_size: int, steps: int, **settings: Any
) -> Iterator[float]:
    """Train a job for each dataset, from the same adapter; yield the loss of the last job's step after each pass."""
    losses: list[float] = []

    def on_event(event: AnyEvent) -> None:
        if isinstance(event, Step):
            losses.append(event.loss)

    bank = Bank(base.model)
    trainer = Trainer(base, bank, on_event=on_event, **settings)
    config = TrainConfig(
        learning_rate=RATE, schedule="constant", warmup_ratio=0, batch_size=batch_size, max_steps=steps, seed=0
    )
    for n, examples in enumerate(datasets):
        trainer.add(bank.load(adapter, f"job {n}", trainable=True), examples, config)
    return (losses[-1] for _ in trainer)
