"""Which adapter each request asks for, and when it comes: the workloads of Punica and of S-LoRA. Knows numbers only."""

import math
import random
from dataclasses import dataclass

import numpy as np


def popularity(kind: str, requests: int) -> list[int]:
    """Return each request's adapter, as Punica draws them (benchmark_utils.get_lora_lens).

    identical: one for all · distinct: each its own · uniform: √requests of them, equally · zipf:1.5: 1, 1, 2, 3, 5, …
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
    drawn = [adapter for adapter, count in enumerate(counts) for _ in range(count)]
    random.Random(0xABCDABCD987).shuffle(drawn)
    return drawn


@dataclass(frozen=True)
class Arrival:
    """A request of a trace."""

    at: float
    """Seconds after the trace's beginning."""
    adapter: int
    prompt: int
    """Tokens; so is `answer`."""
    answer: int


def trace(
    *, adapters: int, rate: float, seconds: float, alpha: float = 1.0, cv: float = 1.0, low: int = 8, high: int = 64
) -> list[Arrival]:
    """Return S-LoRA's trace: gaps from a Gamma distribution, adapters by a power law, lengths uniform; seed 42."""
    chance = np.random.default_rng(42)
    total = int(rate * seconds)
    own = (chance.power(alpha, total) * adapters).astype(int)
    times = np.cumsum(chance.gamma(1 / cv**2, cv**2 / rate, total))
    lengths = chance.integers(low, high, (total, 2))
    return [
        Arrival(float(at), int(adapter), int(prompt), int(answer))
        for at, adapter, (prompt, answer) in zip(times, own, lengths, strict=True)
    ]
