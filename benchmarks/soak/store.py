"""A store of many adapters, each with weights of its own, and which version of a name is the latest when.

Knows shapes of linear layers, names and numbers; knows no engine.
"""

import random
import re
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor, nn

from loradeck import Adapter, AdapterStore, LoraConfig

ZIPF = 1.5  # the k-th most popular adapter is asked for k ** -1.5 as often as the first
RANKS = (2, 16)
LAYERS = 9  # that an adapter is on at most
STRENGTH = 0.6  # of an update, over the size of a layer's own weights
THREADS = 8  # that publish the first versions
DTYPES = (torch.float32, torch.bfloat16)


class Crowd:
    """The adapters a0, a1, …, most popular first.

    Two neighbours say different things: ranks, layers, targets, scalings and every number differ.
    """

    def __init__(self, model: nn.Module, folder: Path, count: int, *, strength: float = STRENGTH) -> None:
        self.store = AdapterStore(folder)
        self.count = count
        self._strength = strength
        self._shapes: dict[str, tuple[int, int]] = {}
        self._sizes: dict[str, float] = {}
        for path, module in model.named_modules():
            if isinstance(module, nn.Linear) and re.search(r"\.\d+\.", path):
                self._shapes[path] = (module.out_features, module.in_features)
                self._sizes[path] = float(module.weight.detach().norm())
        self._popularity = list(accumulate((own + 1) ** -ZIPF for own in range(count)))
        self._published: dict[str, int] = {}
        self._begun: dict[str, int] = {}
        with ThreadPoolExecutor(THREADS) as threads:  # most of it is waiting for the disk
            list(threads.map(self._publish_first, range(count)))

    def _publish_first(self, number: int) -> None:
        self.publish(f"a{number}", seed=number)

    def draw(self, chance: random.Random) -> str:
        """Return a name, the popular ones more often."""
        return f"a{chance.choices(range(self.count), cum_weights=self._popularity)[0]}"

    def publish(self, name: str, seed: int) -> None:
        """Publish another version of a name; two threads never do so of one name."""
        self.begin(name)
        self.store.publish(name, self.adapter(seed))
        self.done(name)

    def begin(self, name: str) -> None:
        """Say that a version is about to be published."""
        self._begun[name] = self._published.get(name, 0) + 1

    def done(self, name: str) -> None:
        """Say that it is."""
        self._published[name] = self._begun[name]

    def latest(self, name: str) -> int:
        """Return the number of the version that everybody sees by now."""
        return self._published[name]

    def newest(self, name: str) -> int:
        """Return the number of the version that somebody may see by now."""
        return self._begun[name]

    def folder(self, name: str, version: int) -> Path:
        return self.store.folder / f"{name}@{version}"

    def adapter(self, seed: int) -> Adapter:
        """Return an adapter that no other seed gives."""
        chance, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        r, dtype = chance.randint(*RANKS), chance.choice(DTYPES)
        layers = sorted({_layer(path) for path in self._shapes})
        layers = chance.sample(layers, min(len(layers), chance.randint(2, LAYERS)))
        kinds = sorted({_kind(path) for path in self._shapes})
        kinds = chance.sample(kinds, chance.randint(1, min(3, len(kinds))))
        config = LoraConfig(r=r, lora_alpha=chance.choice((1, 2)) * r, use_rslora=chance.random() < 0.25)

        def pair(path: str) -> tuple[Tensor, Tensor]:
            rows, columns = self._shapes[path]
            a = torch.randn(r, columns, generator=generator) / columns**0.5
            b = torch.randn(rows, r, generator=generator)
            # A x is about as large as x's elements, so that this makes B A x as large as W x, times strength.
            scale = self._strength * self._sizes[path] / (rows * r) ** 0.5 / config.scaling(path, r)
            return a.to(dtype), (b * scale).to(dtype)

        chosen = [path for path in self._shapes if _layer(path) in layers and _kind(path) in kinds]
        return Adapter.of(config, {path: pair(path) for path in chosen})


def _layer(path: str) -> int:
    found = re.search(r"\.(\d+)\.", path)
    assert found is not None
    return int(found[1])


def _kind(path: str) -> str:
    return path.rpartition(".")[2]
