"""Which documents a step reads, and how they lie in a batch. Knows token ids; knows no text and no model.

B documents   T tokens of the longest, or of all where they are packed
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Generic, TypeVar

import torch
from torch import Tensor

from loradeck.dataset.example import UNSUPERVISED, Example
from loradeck.train.packing import positions

PADDING = 0  # any id of the vocabulary: attention_mask hides it from the model, labels from the loss

T = TypeVar("T")


class Batches(Generic[T]):
    """The examples of each step, pass after pass without end; each pass has its own order, which the seed decides.

    A function of the step's number, so a run that goes on where another ended reads on where that one did. The last
    batch of a pass holds what is left.
    """

    def __init__(self, examples: Sequence[T], size: int, *, seed: int) -> None:
        self.examples, self.size, self.seed = examples, size, seed
        self._order = lru_cache(maxsize=1)(self._shuffled)

    def __len__(self) -> int:
        """Return the steps of one pass."""
        return -(-len(self.examples) // self.size)

    def __getitem__(self, step: int) -> list[T]:
        """Return the examples of a step, counted from 0."""
        epoch, at = divmod(step, len(self))
        return [self.examples[n] for n in self._order(epoch)[at * self.size : (at + 1) * self.size]]

    def _shuffled(self, epoch: int) -> list[int]:
        chance = random.Random(f"{self.seed} {epoch}")  # a string seeds alike in every process
        return chance.sample(range(len(self.examples)), len(self.examples))


def pieces(units: Sequence[Sequence[Example]], tokens: int) -> Iterator[list[Sequence[Example]]]:
    """Cut units of documents, in their order, into pieces of at most so many tokens; a longer unit is one by itself."""
    piece: list[Sequence[Example]] = []
    size = 0
    for unit in units:
        own = sum(len(document.tokens) for document in unit)
        if piece and size + own > tokens:
            yield piece
            piece = []
            size = 0
        piece.append(unit)
        size += own
    if piece:
        yield piece


@dataclass(frozen=True, slots=True)
class Batch:
    """Documents as one row, end to end, or as a row each, padded on the right: int64 tensors of one shape."""

    input_ids: Tensor
    labels: Tensor
    """The token where it is learned, UNSUPERVISED elsewhere and at the first of each document, which none predicts."""
    lengths: tuple[int, ...]
    """Tokens of each document."""
    learned: tuple[int, ...]
    """Supervised tokens of each document."""
    position_ids: Tensor | None
    """From 0 for each document, where they are packed."""
    attention_mask: Tensor | None
    """1 on tokens, 0 on padding, where they are not."""


def collate(documents: Sequence[Example], *, packed: bool, device: torch.device | str = "cpu") -> Batch:
    """Lay documents in one batch on `device`."""
    lengths = tuple(len(document.tokens) for document in documents)
    ids = [document.tokens for document in documents]
    labels = [[UNSUPERVISED, *document.labels[1:]] for document in documents]
    mask = None
    if packed:
        ids, labels = [[*chain(*ids)]], [[*chain(*labels)]]
    else:
        longest = max(lengths)
        mask = torch.tensor([[1] * n + [0] * (longest - n) for n in lengths], device=device)
        ids = [own + [PADDING] * (longest - len(own)) for own in ids]
        labels = [own + [UNSUPERVISED] * (longest - len(own)) for own in labels]
    return Batch(
        input_ids=torch.tensor(ids, device=device),
        labels=torch.tensor(labels, device=device),
        lengths=lengths,
        learned=tuple(document.supervised for document in documents),
        position_ids=positions(lengths).to(device) if packed else None,
        attention_mask=mask,
    )
