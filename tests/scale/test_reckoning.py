"""The reckoning of docs/scale.md follows from its inputs: the result files, the engine's defaults and its formulas."""

import json
from pathlib import Path

import numpy as np
import pytest

from loradeck.serve.config import EngineConfig

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
ADAPTERS, REPLICAS, REQUESTS = 100_000, 100, 1_000  # requests per second, of all replicas
FIGURES = json.loads((ROOT / "benchmarks" / "results" / "adapters.avx512.json").read_text(encoding="utf-8"))["figures"]
FILE = int(FIGURES["load"]["file_bytes"])
TENSORS = int(FIGURES["memory bfloat16"]["tensor_bytes"])
DEVICE = EngineConfig().adapter_bytes // TENSORS
MEMORY = EngineConfig().memory_bytes // TENSORS


def misses(exponent: float, room: int) -> float:
    """Return the share of requests whose adapter is not in an LRU cache, by Che's approximation."""
    shares = np.arange(1, ADAPTERS + 1, dtype=np.float64) ** -exponent
    shares /= shares.sum()
    if room >= ADAPTERS:
        return 0.0
    least, most = 1.0, 1e15  # requests after which an adapter has left
    for _ in range(200):
        middle = (least * most) ** 0.5
        if (1 - np.exp(-shares * middle)).sum() < room:
            least = middle
        else:
            most = middle
    return float((shares * np.exp(-shares * least)).sum())


def rows() -> list[str]:
    """Return the rows of the table of loads."""
    lines = []
    for tiers, room in (("device", DEVICE), ("device and memory", DEVICE + MEMORY)):
        for where, replicas in (("any replica", 1), ("the adapter's replica", REPLICAS)):
            cells = [tiers, where, f"{room * replicas:,}"]
            for exponent in (1.0, 1.5):
                share = misses(exponent, room * replicas)
                loads = share * REQUESTS
                cells.append(f"{share:.1%}, {loads:.0f}/s, {loads * FILE / 1e6:,.0f} MB/s" if share else "0")
            lines.append(f"| {' | '.join(cells)} |")
    return lines


@pytest.mark.parametrize("row", rows())
def test_a_row_of_loads_is_as_reckoned(row: str) -> None:
    assert row in PAGE.splitlines()


def test_the_inputs_are_those_that_were_measured() -> None:
    for text in (
        f"{FILE:,} bytes",
        f"{TENSORS:,} bytes",
        f"{FILE * ADAPTERS / 1e9:,.0f} GB",
        f"{FILE * ADAPTERS / REPLICAS / 1e9:.1f} GB",
        f"room for {DEVICE:,} adapters on the device and {MEMORY:,} in memory",
    ):
        assert text in PAGE, text


def test_the_approximation_is_that_of_a_simulated_cache() -> None:
    generator = np.random.default_rng(0)
    shares = np.arange(1, ADAPTERS + 1, dtype=np.float64) ** -1.5
    cache: dict[int, None] = {}
    count, absent = 60_000, 0
    for at, adapter in enumerate(generator.choice(ADAPTERS, size=count, p=shares / shares.sum()).tolist()):
        if adapter in cache:
            del cache[adapter]
        else:
            absent += at >= count // 2  # the cache is warm by then
        cache[adapter] = None
        if len(cache) > DEVICE:
            del cache[next(iter(cache))]
    assert absent / (count // 2) == pytest.approx(misses(1.5, DEVICE), rel=0.05)
