"""What the tests of adapters share: a model with a layer of every kind, and adapters that do something."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loradeck import Adapter


@pytest.fixture(autouse=True)
def small_tensors(one_thread: None) -> None:
    """Every test here computes on one thread."""


class Zoo(nn.Module):
    """One layer of every kind that takes an adapter, none of them square: (batch, 6) ids -> (batch, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 12)
        self.conv1 = nn.Conv1d(12, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(1, 4, (3, 2), stride=2)
        self.grouped = nn.Conv2d(4, 6, 1, groups=2)
        self.mix = Conv1D(7, 18)
        self.norm = nn.LayerNorm(7)
        self.linear = nn.Linear(7, 5)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (batch, 6) -> (batch, 5)."""
        x = self.conv1(self.embed(ids).transpose(1, 2)).relu()  # (batch, 8, 6)
        x = self.grouped(self.conv2(x[:, None]).relu())  # (batch, 6, 3, 3)
        return self.linear(self.norm(self.mix(x.flatten(2).transpose(1, 2).flatten(1).unflatten(1, (3, 18))))).sum(1)


LAYERS = ("embed", "conv1", "conv2", "grouped", "mix", "linear")


@pytest.fixture
def zoo() -> Zoo:
    """A fresh frozen Zoo with the same weights in every test."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Zoo().eval().requires_grad_(False)


@pytest.fixture
def fill() -> Callable[..., Adapter]:
    """Return a function that gives an adapter random values, so that it does something; the same for a seed."""

    def fill(adapter: Adapter, seed: int = 0, size: float = 0.3) -> Adapter:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
        return adapter

    return fill


@pytest.fixture
def ids() -> Tensor:
    """Four prompts of seven tokens for the tiny model."""
    return torch.randint(3, 260, (4, 7), generator=torch.Generator().manual_seed(5))
