"""A store of many random adapters, and which version of a name is the latest at any moment."""

import random
import re
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path

import torch
from torch import nn

from benchmarks.models import RandomAdapters
from loradeck import Adapter, AdapterStore, LoraConfig

ZIPF = 1.5  # the k-th most popular adapter is requested k ** -1.5 times as often as the first
RANKS = (2, 16)
LAYERS = 9  # of an adapter, at most
STRENGTH = 0.6  # of an update, relative to the layer's own output
THREADS = 8  # that publish the first versions
DTYPES = (torch.float32, torch.bfloat16)


class Catalogue:
    """The adapters a0, a1, …, most popular first.

    No two are alike: ranks, layers, targets, scalings and every number differ.
    """

    def __init__(self, model: nn.Module, folder: Path, count: int, *, strength: float = STRENGTH) -> None:
        self.store = AdapterStore(folder)
        self.count = count
        self._adapters, self._strength = RandomAdapters(model), strength
        self._popularity = list(accumulate((number + 1) ** -ZIPF for number in range(count)))
        self._published: dict[str, int] = {}
        self._started: dict[str, int] = {}
        with ThreadPoolExecutor(THREADS) as threads:  # most of it is waiting for the disk
            list(threads.map(self.publish, [f"a{number}" for number in range(count)], range(count)))

    def draw(self, rng: random.Random) -> str:
        """Return a name, the popular ones more often."""
        return f"a{rng.choices(range(self.count), cum_weights=self._popularity)[0]}"

    def publish(self, name: str, seed: int) -> None:
        """Publish another version of a name; two threads never do so for one name."""
        self.start(name)
        self.store.publish(name, self.adapter(seed))
        self.finish(name)

    def start(self, name: str) -> None:
        """Note that a version is about to be published."""
        self._started[name] = self._published.get(name, 0) + 1

    def finish(self, name: str) -> None:
        """Note that it is published."""
        self._published[name] = self._started[name]

    def give_up(self, name: str) -> None:
        """Note that it was refused."""
        self._started[name] = self._published[name]

    def latest(self, name: str) -> int:
        """Return the latest version that is visible for certain."""
        return self._published[name]

    def newest(self, name: str) -> int:
        """Return the latest version that may be visible."""
        return self._started[name]

    def folder(self, name: str, version: int) -> Path:
        return self.store.folder / f"{name}@{version}"

    def adapter(self, seed: int) -> Adapter:
        """Return an adapter that no other seed gives."""
        rng = random.Random(seed)
        r, dtype = rng.randint(*RANKS), rng.choice(DTYPES)
        layers = sorted({_layer(path) for path in self._adapters.shapes})
        layers = rng.sample(layers, min(len(layers), rng.randint(2, LAYERS)))
        kinds = sorted({_kind(path) for path in self._adapters.shapes})
        kinds = rng.sample(kinds, rng.randint(1, min(3, len(kinds))))
        config = LoraConfig(r=r, lora_alpha=rng.choice((1, 2)) * r, use_rslora=rng.random() < 0.25)
        paths = [path for path in self._adapters.shapes if _layer(path) in layers and _kind(path) in kinds]
        return self._adapters.make(seed, config, dtype=dtype, strength=self._strength, paths=paths)


def _layer(path: str) -> int:
    match = re.search(r"\.(\d+)\.", path)
    assert match is not None
    return int(match[1])


def _kind(path: str) -> str:
    return path.rpartition(".")[2]
