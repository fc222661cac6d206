"""Which adapters each row of a batch goes through, at which weights."""

from collections.abc import Sequence

import torch

from loradeck.ops.segments import Segments

KEPT = 8  # segments of one mapping: batches of other lengths, other devices

AdapterWeights = tuple[tuple[int, float], ...]  # (index in the working set, weight); empty for the base


class LoraMapping:
    """A batch as consecutive entries, each of one or more rows, or of tokens of a packed row."""

    __slots__ = ("_segments", "entries", "lengths", "total")

    def __init__(self, entries: Sequence[AdapterWeights], lengths: Sequence[int]) -> None:
        """`lengths` counts the rows of each entry, or its tokens."""
        self.entries, self.lengths = tuple(entries), tuple(lengths)
        self.total = sum(lengths)
        self._segments: dict[tuple[int, torch.device], Segments] = {}

    def __reduce__(self) -> tuple[type["LoraMapping"], tuple[object, ...]]:
        """A copy makes its own segments, which hold addresses."""
        return LoraMapping, (self.entries, self.lengths)

    @property
    def adapters(self) -> list[int]:
        """The adapters of any entry."""
        return list(dict.fromkeys(adapter for entry in self.entries for adapter, _ in entry))

    def segments(self, unit: int, device: torch.device) -> Segments:
        """Return the batch's segments where a row has `unit` tokens; made once, for all layers and steps alike."""
        key = unit, device
        segments = self._segments.get(key)
        if segments is None:
            while len(self._segments) >= KEPT:
                self._segments.pop(next(iter(self._segments)), None)
            segments = self._segments[key] = Segments.of(self.entries, self.lengths, unit, device)
        return segments
