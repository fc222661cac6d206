"""The tokens of a batch grouped by adapter: the one index that every kernel reads.

T tokens (rows of the layer's flattened input)   K pairs of a token and an adapter   S adapters in use
"""

import ctypes
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from loradeck.ops.dropout import dropped

Run = tuple[int, int, float]  # the tokens [start, stop) at one weight


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """The tokens of one adapter."""

    adapter: int
    """Its index in the working set."""
    rows: slice | Tensor
    """The token indices: a slice where they are contiguous, else (n,) int64."""
    weight: float | Tensor
    """One weight for all tokens, or (n, 1) float32."""
    length: int
    """n"""


class CSegments(ctypes.Structure):
    """The arrays of Segments, as cpu.c reads them."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("token_indices", "weights", "starts", "adapters")),
        *((name, ctypes.c_int64) for name in ("pairs", "count")),
    )


@dataclass(eq=False)
class Segments:
    """Token indices sorted by adapter, and where each adapter's tokens start.

    The arrays are those of vLLM's LoRAKernelMeta: token_indices_sorted_by_lora_ids, lora_token_start_loc and
    active_lora_ids. A token of a blend appears once for each of its adapters.
    """

    runs: dict[int, list[Run]]
    """The runs of tokens of each adapter in use, by ascending adapter."""
    tokens: int
    """T"""
    device: torch.device
    _splits: dict[frozenset[int], tuple["Segments", "Segments"]] = field(default_factory=dict)
    _repeats: dict[int, "Segments"] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        entries: Sequence[Sequence[tuple[int, float]]],
        lengths: Sequence[int],
        unit: int,
        device: torch.device,
    ) -> "Segments":
        """Return the segments of a batch; an entry covers `length · unit` tokens."""
        runs: dict[int, list[Run]] = {}
        start = 0
        for entry, length in zip(entries, lengths, strict=True):
            stop = start + length * unit
            for adapter, weight in entry if stop > start else ():
                segment = runs.setdefault(adapter, [])
                if segment and segment[-1][1:] == (start, weight):
                    segment[-1] = (segment[-1][0], stop, weight)
                else:
                    segment.append((start, stop, weight))
            start = stop
        return cls(dict(sorted(runs.items())), start, device)

    @cached_property
    def adapters(self) -> tuple[int, ...]:
        """The S adapters in use, ascending."""
        return tuple(self.runs)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """The number of tokens of each adapter (S)."""
        return tuple(sum(stop - start for start, stop, _ in runs) for runs in self.runs.values())

    @cached_property
    def longest(self) -> int:
        """The number of tokens of the longest segment."""
        return max(self.lengths, default=0)

    @cached_property
    def token_indices(self) -> Tensor:
        """(K,) int64, sorted by adapter."""
        spans = [torch.arange(start, stop) for runs in self.runs.values() for start, stop, _ in runs]
        return self._tensor(torch.cat(spans) if spans else torch.empty(0, dtype=torch.int64))

    @cached_property
    def weights(self) -> Tensor:
        """(K,) float32."""
        runs = [run for runs in self.runs.values() for run in runs]
        weights = torch.tensor([weight for _, _, weight in runs], dtype=torch.float32)
        return self._tensor(weights.repeat_interleave(torch.tensor([stop - start for start, stop, _ in runs] or [0])))

    @cached_property
    def starts(self) -> Tensor:
        """(S + 1,) int64: the pairs of the s-th adapter are starts[s] to starts[s + 1] - 1."""
        return self._tensor(torch.tensor([0, *self.lengths]).cumsum(0))

    @cached_property
    def pair_adapters(self) -> Tensor:
        """(K,) int64: the adapter of each pair."""
        adapters = torch.tensor(self.adapters, dtype=torch.int64)
        return self._tensor(adapters.repeat_interleave(torch.tensor(self.lengths, dtype=torch.int64)))

    @cached_property
    def by_token(self) -> tuple[Tensor, Tensor]:
        """The pairs sorted by token, (K,) int64, and where each token's pairs start, (T + 1,) int64."""
        tokens, order = self.token_indices.sort(stable=True)
        starts = torch.searchsorted(tokens, torch.arange(self.tokens + 1, device=self.device))
        return self._tensor(order), self._tensor(starts)

    def _tensor(self, tensor: Tensor) -> Tensor:
        with torch.inference_mode(False):  # a tensor made in inference mode could not be saved for a backward pass
            return tensor.to(self.device).clone() if tensor.is_inference() else tensor.to(self.device)

    @cached_property
    def all(self) -> tuple[Segment, ...]:
        """Each adapter's segment."""
        segments = []
        start = 0
        for (adapter, runs), length in zip(self.runs.items(), self.lengths, strict=True):
            pairs = slice(start, start + length)
            rows = slice(*runs[0][:2]) if len(runs) == 1 else self.token_indices[pairs]
            weights = {weight for _, _, weight in runs}
            weight = weights.pop() if len(weights) == 1 else self.weights[pairs, None]
            segments.append(Segment(adapter, rows, weight, length))
            start += length
        return tuple(segments)

    @cached_property
    def c_struct(self) -> CSegments:
        """The arrays for cpu.c; they live as long as these segments."""
        self._adapters = torch.tensor(self.adapters, dtype=torch.int64)
        arrays = (self.token_indices, self.weights, self.starts, self._adapters)
        return CSegments(*(array.data_ptr() for array in arrays), len(self.token_indices), len(self.adapters))

    def split(self, adapters: Collection[int]) -> tuple["Segments", "Segments"]:
        """Return the segments of all other adapters, and those of these; made once, the layers of a step are alike."""
        key = frozenset(adapters)
        halves = self._splits.get(key)
        if halves is None:
            rest = {adapter: runs for adapter, runs in self.runs.items() if adapter not in key}
            chosen = {adapter: runs for adapter, runs in self.runs.items() if adapter in key}
            halves = Segments(rest, self.tokens, self.device), Segments(chosen, self.tokens, self.device)
            self._splits[key] = halves
        return halves

    def repeat(self, times: int) -> "Segments":
        """Return the segments where each token is `times` consecutive ones, as a convolution's positions are."""
        if times == 1:
            return self
        segments = self._repeats.get(times)
        if segments is None:
            runs = {
                adapter: [(start * times, stop * times, weight) for start, stop, weight in runs]
                for adapter, runs in self.runs.items()
            }
            segments = self._repeats[times] = Segments(runs, self.tokens * times, self.device)
        return segments


def take(items: Tensor, rows: slice | Tensor) -> Tensor:
    """Return these rows; a view for a slice."""
    return items[rows] if isinstance(rows, slice) else items.index_select(0, rows)


def add(
    items: Tensor, rows: slice | Tensor, left: Tensor, right: Tensor, *, factor: float = 1.0, keep: Tensor | None = None
) -> None:
    """items[rows] += factor · left right in place, with zeros where `keep` is False."""
    if isinstance(rows, slice) and keep is None and items.dtype == left.dtype == right.dtype:
        items[rows].addmm_(left, right, alpha=factor)
    elif isinstance(rows, slice):
        items[rows].add_(dropped(left @ right, keep), alpha=factor)
    else:
        items.index_add_(0, rows, dropped(left @ right, keep).to(items.dtype), alpha=factor)
