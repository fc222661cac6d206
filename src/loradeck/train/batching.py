"""Which examples a step sees, as tensors. Knows token ids; knows no text and no model.

B sequences of a batch   T tokens of its longest
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from loradeck.train.example import UNSUPERVISED, Example

# Sorting by length within windows of 20 batches saves most of the padding and leaves most of the chance (the window of
# PEFT's training benchmark, which measured a quarter of the time saved).
WINDOW = 20
PADDING = 0  # any id of the vocabulary: attention_mask hides it from the model, labels from the loss


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences of one step, padded on the right: (B, T) int64 each."""

    input_ids: Tensor
    attention_mask: Tensor
    """1 on tokens, 0 on padding."""
    labels: Tensor
    """The token where it is learned, UNSUPERVISED elsewhere."""

    @property
    def tokens(self) -> int:
        """Tokens without the padding."""
        return int(self.attention_mask.sum())


def batches(examples: Sequence[Example], size: int, *, seed: int) -> Iterator[list[Example]]:
    """Yield `size` examples at a time, pass after pass without end; each pass has its own order, which `seed` decides.

    The last batch of a pass holds what is left.
    """
    for epoch in count():
        chance = random.Random(f"{seed} {epoch}")  # a string seeds alike in every process
        shuffled = chance.sample(examples, len(examples))
        for start in range(0, len(shuffled), size * WINDOW):
            window = sorted(shuffled[start : start + size * WINDOW], key=lambda example: len(example.tokens))
            groups = [window[at : at + size] for at in range(0, len(window), size)]
            chance.shuffle(groups)
            yield from groups


def collate(examples: Sequence[Example], device: torch.device | str = "cpu") -> Batch:
    """Pad examples on the right into one batch on `device`."""
    lengths = [len(example.tokens) for example in examples]
    longest = max(lengths)
    rows = {
        "input_ids": [example.tokens + [PADDING] * (longest - len(example.tokens)) for example in examples],
        "attention_mask": [[1] * length + [0] * (longest - length) for length in lengths],
        "labels": [example.labels + [UNSUPERVISED] * (longest - len(example.labels)) for example in examples],
    }
    return Batch(**{name: torch.tensor(value, dtype=torch.int64, device=device) for name, value in rows.items()})
