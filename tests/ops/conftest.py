"""Layers of every kind with random adapters, and the batches on which all implementations must agree."""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loradeck.ops.layer_kinds import kind_of
from loradeck.ops.mapping import AdapterWeights, LoraMapping
from loradeck.ops.segments import Segments
from loradeck.ops.weights import LayerAdapters, LoraWeights

ROWS = 8
RANKS = (1, 2, 4, 8, 16, 64)
SCALINGS = (0.5, 1.0, 2.0)


def transformers_conv1d(out: int, inner: int) -> nn.Module:
    layer = Conv1D(out, inner)
    nn.init.normal_(layer.weight)
    return layer


# kind -> (how to make the layer, the shape of one row of its input, what its ranks must divide by)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "linear": (lambda: nn.Linear(12, 10), (12,), 1),
    "linear of tokens": (lambda: nn.Linear(12, 10, bias=False), (5, 12), 1),
    "linear of 4 dimensions": (lambda: nn.Linear(12, 10), (2, 3, 12), 1),
    "embedding": (lambda: nn.Embedding(11, 10), (5,), 1),
    "conv1d": (lambda: nn.Conv1d(6, 10, 3), (6, 9), 1),
    "conv1d, stride, dilation, padding": (
        lambda: nn.Conv1d(6, 10, 3, stride=2, dilation=2, padding=3, groups=2),
        (6, 9),
        2,
    ),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding="same"), (4, 5, 6), 1),
    "conv2d in groups": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(1, 2), groups=2), (4, 5, 6), 2),
    "transformers' Conv1D": (lambda: transformers_conv1d(10, 12), (5, 12), 1),
}


@dataclass
class Case:
    """A layer, a batch for it, the base's output, and adapters for it."""

    layer: nn.Module
    x: Tensor
    y: Tensor
    adapters: LayerAdapters
    conv: dict

    def defined(self, row: int, entry: AdapterWeights) -> Tensor:
        """One row through its entry in float64, computed without loradeck."""
        x = self.x[row : row + 1]
        x = x.double() if x.is_floating_point() else x
        y = self.y[row : row + 1].double()
        for adapter, weight in entry:
            weights = self.adapters.weights[adapter]
            if weights is None:
                continue
            a, b = weights.a.detach().double(), weights.b.detach().double()
            if isinstance(self.layer, nn.Embedding):
                update = F.embedding(x, a.T) @ b.T
            elif isinstance(self.layer, nn.Conv1d | nn.Conv2d):
                conv = F.conv1d if isinstance(self.layer, nn.Conv1d) else F.conv2d
                update = conv(conv(x, a, **self.conv), b, groups=self.layer.groups)
            else:
                update = x @ a.T @ b.T
            y = y + weight * weights.scaling * update
        return y[0]


Lora = Callable[[Tensor, Tensor, LayerAdapters, LoraMapping], Tensor]


def of_mapping(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a kernel that takes the mapping in place of its segments, as the reference does."""

    def lora(x: Tensor, y: Tensor, adapters: LayerAdapters, mapping: LoraMapping, **settings: Any) -> Tensor:
        segments = mapping.segments(adapters.kind.count(x) // mapping.total, x.device)
        return kernel(x, y, adapters, segments, **settings)

    return lora


def calls_of(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> list[Segments]:
    """Return a list that collects the segments of each call of a kernel from now on."""
    calls: list[Segments] = []
    lora = module.lora

    def spy(x: Tensor, y: Tensor, adapters: LayerAdapters, segments: Segments, **settings: Any) -> Tensor:
        calls.append(segments)
        return lora(x, y, adapters, segments, **settings)

    monkeypatch.setattr(module, "lora", spy)
    return calls


@pytest.fixture(autouse=True)
def small_tensors(one_thread: None) -> None:
    """Every test here computes on one thread."""


@pytest.fixture
def make() -> Callable[..., Case]:
    """Return a function that makes a case: a layer of this kind with this many adapters of mixed ranks."""

    def make(kind: str, *, count: int = ROWS, dtype: torch.dtype = torch.float32, trains: bool = False) -> Case:
        torch.manual_seed(0)
        factory, shape, divisor = LAYERS[kind]
        layer = factory().to(dtype)
        layer_kind = kind_of(layer)
        assert not isinstance(layer_kind, str)
        weights = []
        for i in range(count):
            r = max(RANKS[i % len(RANKS)], divisor)
            a_shape, b_shape = layer_kind.shapes(r)
            a = torch.randn(a_shape, dtype=torch.float64) / a_shape[1] ** 0.5
            b = torch.randn(b_shape, dtype=torch.float64) / r**0.5
            a, b = (t.to(dtype).requires_grad_(trains) for t in (a, b))
            weights.append(LoraWeights(a, b, SCALINGS[i % len(SCALINGS)]))
        ids = isinstance(layer, nn.Embedding)
        x = torch.randint(11, (ROWS, *shape)) if ids else torch.randn(ROWS, *shape, dtype=torch.float64).to(dtype)
        with torch.no_grad():
            y = layer(x)
        names = ("stride", "padding", "dilation") if isinstance(layer, nn.Conv1d | nn.Conv2d) else ()
        return Case(
            layer, x, y, LayerAdapters(layer_kind, tuple(weights)), {name: getattr(layer, name) for name in names}
        )

    return make


def zipf_batch() -> tuple[AdapterWeights, ...]:
    generator = torch.Generator().manual_seed(1)
    popularity = torch.arange(1, ROWS + 1).double().pow(-1.5)
    drawn = torch.multinomial(popularity, ROWS, replacement=True, generator=generator)
    return tuple(((int(i), 1.0),) for i in drawn)


def uniform_batch() -> tuple[AdapterWeights, ...]:
    generator = torch.Generator().manual_seed(2)
    drawn = torch.randint(-1, 6, (ROWS,), generator=generator)
    return tuple(((int(i), 1.0),) if i >= 0 else () for i in drawn)


def blended_batch() -> tuple[AdapterWeights, ...]:
    generator = torch.Generator().manual_seed(3)
    entries: list[AdapterWeights] = []
    for row in range(ROWS):
        members = torch.randperm(8, generator=generator)[: row % 4].tolist()
        weights = torch.randn(len(members), generator=generator).tolist()
        entries.append(tuple(zip(members, weights, strict=True)))
    return tuple(entries)


BATCHES: dict[str, tuple[AdapterWeights, ...]] = {
    "base only": ((),) * ROWS,
    "identical": (((3, 1.0),),) * ROWS,
    "distinct": tuple(((i, 1.0),) for i in range(ROWS)),
    "uniform": uniform_batch(),
    "zipf 1.5": zipf_batch(),
    "blended": blended_batch(),
    "alternating": tuple(((i % 2, 1.0),) if i % 3 else () for i in range(ROWS)),
    "one factor": tuple(((0, -0.7),) if i < 5 else () for i in range(ROWS)),
    "weight 0": tuple(((i % 4, 0.0), (4, 1.0)) if i % 2 else ((2, 0.0),) for i in range(ROWS)),
    "one adapter twice in a blend": tuple(((i % 3, 0.5), (i % 3, 0.25)) for i in range(ROWS)),
}


@pytest.fixture(params=BATCHES)
def entries(request: pytest.FixtureRequest) -> tuple[AdapterWeights, ...]:
    """Each batch."""
    return BATCHES[request.param]


@pytest.fixture(params=LAYERS)
def kind(request: pytest.FixtureRequest) -> str:
    """Each kind of layer."""
    return request.param
