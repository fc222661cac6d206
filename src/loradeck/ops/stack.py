"""Memory in which pairs lie one upon the other, ready for batched products. Knows pairs; knows no batch, no adapter.

C slots   W ranks of a slot, a power of two; what a pair has less is zeros   I features in   O features out
"""

from collections.abc import Mapping
from dataclasses import dataclass
from threading import Lock

import torch

from loradeck.ops.weights import Pair

NARROWEST = 4  # ranks; below, a slot of its own width would save no time


def width_of(r: int) -> int:
    """Return how many ranks a slot has for a pair of rank r."""
    return max(NARROWEST, 1 << (r - 1).bit_length())


@dataclass(frozen=True, slots=True)
class Held:
    """What lies in a slot, as it was when it was put there."""

    pair: Pair
    version: int | None

    @property
    def current(self) -> bool:
        """Whether the pair has not been written to since."""
        return self.version is not None and self.version == self.pair.version


class Stack:
    """A (C, I, W) and B (C, W, O), the latter times the pair's scaling: a pair that joins is copied by itself.

    A lies with the rank last, as a product with few rows reads it: a fifth of the time of the other way round.
    """

    def __init__(self, width: int, inside: int, outside: int, dtype: torch.dtype, device: torch.device) -> None:
        self.a = torch.zeros(0, inside, width, dtype=dtype, device=device)
        self.b = torch.zeros(0, width, outside, dtype=dtype, device=device)
        self._held: dict[int, Held] = {}
        self._lock = Lock()

    def fill(self, pairs: Mapping[int, Pair], slots: int) -> None:
        """Let these pairs lie in their slots, and zeros in the others; there are so many slots at least."""
        with self._lock:
            self._fill(pairs, slots)

    def _fill(self, pairs: Mapping[int, Pair], slots: int) -> None:
        if slots > self.a.shape[0]:
            self._grow(max(slots, self.a.shape[0] * 3 // 2))
        for slot in [slot for slot in self._held if slot not in pairs]:
            self.a[slot].zero_()
            self.b[slot].zero_()
            del self._held[slot]
        for slot, pair in pairs.items():
            held = self._held.get(slot)
            if held is None or held.pair is not pair or not held.current:
                self._put(slot, pair)

    def _put(self, slot: int, pair: Pair) -> None:
        if pair.r < self.a.shape[2]:
            self.a[slot].zero_()
            self.b[slot].zero_()
        self.a[slot, :, : pair.r] = pair.a.T
        # Cast first: a product of half precision and a number is rounded to half precision, whatever it is written to.
        torch.mul(pair.b.T.to(self.b.dtype), pair.scaling, out=self.b[slot, : pair.r])
        self._held[slot] = Held(pair, pair.version)

    def _grow(self, slots: int) -> None:
        for name in ("a", "b"):
            old = getattr(self, name)
            new = old.new_zeros(slots, *old.shape[1:])
            new[: len(old)] = old
            setattr(self, name, new)
