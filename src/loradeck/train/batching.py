"""Which examples each step trains on, and how they are laid out in a batch.

B examples   T tokens of the longest example, or of all examples if packed
"""

import random
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, chain
from typing import Generic, TypeVar

import torch
from torch import Tensor

from loradeck.dataset.example import UNSUPERVISED, Example
from loradeck.train.packing import positions

PADDING = 0  # any id of the vocabulary: attention_mask hides it from the model, labels from the loss

T = TypeVar("T")


class BatchSampler(Generic[T]):
    """The examples of each step, epoch after epoch; the seed decides each epoch's order.

    It is a function of the step's number, so a resumed run reads what the interrupted one would have read. The last
    batch of an epoch may be smaller.
    """

    def __init__(self, examples: Sequence[T], batch_size: int, *, seed: int) -> None:
        self.examples, self.batch_size, self.seed = examples, batch_size, seed
        self._order = lru_cache(maxsize=1)(self._shuffled)

    def __len__(self) -> int:
        """Return the number of steps in an epoch."""
        return -(-len(self.examples) // self.batch_size)

    def __getitem__(self, step: int) -> list[T]:
        """Return the examples of a step, counted from 0."""
        epoch, batch = divmod(step, len(self))
        order = self._order(epoch)[batch * self.batch_size : (batch + 1) * self.batch_size]
        return [self.examples[index] for index in order]

    def _shuffled(self, epoch: int) -> "array[int]":
        order = array("I", range(len(self.examples)))  # 4 bytes an example, where a list has 36
        random.Random(f"{self.seed} {epoch}").shuffle(order)  # a string seeds alike in every process
        order.reverse()  # the order that random.sample gives
        return order


def split_units(units: Iterable[Sequence[Example]], max_tokens: int) -> Iterator[list[Sequence[Example]]]:
    """Split units of examples, in order, into groups of at most `max_tokens`; a longer unit is a group by itself."""
    group: list[Sequence[Example]] = []
    tokens = 0
    for unit in units:
        unit_tokens = sum(len(example.tokens) for example in unit)
        if group and tokens + unit_tokens > max_tokens:
            yield group
            group = []
            tokens = 0
        group.append(unit)
        tokens += unit_tokens
    if group:
        yield group


def share(units: Sequence[Sequence[Example]], rank: int, size: int) -> slice:
    """Return which units, in a row, one of `size` processes takes: those of about as many tokens as each other's."""
    ends = [0, *accumulate(sum(len(example.tokens) for example in unit) for unit in units)]
    start, stop = (
        min(range(len(ends)), key=lambda end: abs(ends[end] * size - ends[-1] * part)) for part in (rank, rank + 1)
    )
    return slice(start, stop)


@dataclass(frozen=True, slots=True)
class Batch:
    """Examples packed end to end in one row (1, T), or one row each, padded on the right (B, T); int64."""

    input_ids: Tensor
    labels: Tensor
    """The token where it is trained on, else UNSUPERVISED; always so for an example's first token, never predicted."""
    lengths: tuple[int, ...]
    """Tokens of each example."""
    supervised: tuple[int, ...]
    """Supervised tokens of each example."""
    position_ids: Tensor | None
    """If packed: from 0 for each example."""
    attention_mask: Tensor | None
    """If padded: 1 for tokens, 0 for padding."""


def collate(examples: Sequence[Example], *, packed: bool, device: torch.device | str = "cpu") -> Batch:
    """Lay examples out in one batch on `device`."""
    lengths = tuple(len(example.tokens) for example in examples)
    ids = [example.tokens for example in examples]
    labels = [[UNSUPERVISED, *example.labels[1:]] for example in examples]
    mask = None
    if packed:
        ids, labels = [[*chain(*ids)]], [[*chain(*labels)]]
    else:
        longest = max(lengths)
        mask = torch.tensor([[1] * n + [0] * (longest - n) for n in lengths], device=device)
        ids = [row + [PADDING] * (longest - len(row)) for row in ids]
        labels = [row + [UNSUPERVISED] * (longest - len(row)) for row in labels]
    return Batch(
        input_ids=torch.tensor(ids, device=device),
        labels=torch.tensor(labels, device=device),
        lengths=lengths,
        supervised=tuple(example.supervised for example in examples),
        position_ids=positions(lengths).to(device) if packed else None,
        attention_mask=mask,
    )
