"""Keys and values of rows of one capacity, lying so that attention reads them in place. Knows no request's meaning.

L layers of one shape   N rows   H key heads   C capacity, in tokens   D width of a head
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import Tensor

Owner = TypeVar("Owner")


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer keeps of a token: H, D of keys, D of values."""

    heads: int
    key_width: int
    value_width: int


@dataclass(frozen=True)
class Form:
    """What a model keeps of a token: layers of one shape lie together, because they are copied together."""

    layers: tuple[LayerShape, ...]
    dtype: torch.dtype
    device: torch.device
    shapes: tuple[LayerShape, ...] = field(init=False)
    places: tuple[tuple[int, int], ...] = field(init=False)
    """Of each layer: its shape's number, and its own among the layers of that shape."""

    def __post_init__(self) -> None:
        shapes = tuple(dict.fromkeys(self.layers))
        seen = dict.fromkeys(shapes, -1)
        places = []
        for layer in self.layers:
            seen[layer] += 1
            places.append((shapes.index(layer), seen[layer]))
        object.__setattr__(self, "shapes", shapes)
        object.__setattr__(self, "places", tuple(places))

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        return sum(own.heads * (own.key_width + own.value_width) for own in self.layers) * self.dtype.itemsize

    def tensors(self, *, rows: int, capacity: int) -> list[Tensor]:
        """Return room (L, N, H, C, D) for keys and values of each shape in turn, zeros."""
        return [
            torch.zeros(self.layers.count(own), rows, own.heads, capacity, width, dtype=self.dtype, device=self.device)
            for own in self.shapes
            for width in (own.key_width, own.value_width)
        ]


class Pool(Generic[Owner]):
    """Rows 0 to len(owners) - 1 are taken, without gaps, so that a batch of all of them is a view.

    Beyond what a row's owner has written there are zeros: attention gives it no weight, and 0 · NaN of an owner before
    would be NaN.
    """

    def __init__(self, form: Form, capacity: int) -> None:
        self.form = form
        self.capacity = capacity
        self.owners: list[Owner] = []
        self._tensors = form.tensors(rows=0, capacity=capacity)

    @property
    def rows(self) -> int:
        """Rows there is memory for."""
        return self._tensors[0].shape[1]

    @property
    def row_bytes(self) -> int:
        return self.form.token_bytes * self.capacity

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Return a layer's keys and values, each (N, H, C, D)."""
        shape, place = self.form.places[index]
        return self._tensors[2 * shape][place], self._tensors[2 * shape + 1][place]

    def next_rows(self, most: int) -> int:
        """Return how many rows there is to be memory for with one more owner, at most so many more than now."""
        return self.rows if len(self.owners) < self.rows else self.rows + min(max(1, self.rows // 2), most)

    def add(self, owner: Owner, rows: int) -> int:
        """Take a row, with memory for so many rows, and return its number."""
        self._resize(rows)
        self.owners.append(owner)
        return len(self.owners) - 1

    def remove(self, row: int, length: int) -> None:
        """Give a row back: the last one, which holds `length` tokens, takes its place."""
        last = len(self.owners) - 1
        if row != last:
            self.write(row, 0, self.read(last, 0, length))
            self.owners[row] = self.owners[last]
            for part in self.read(row, length, self.capacity):
                part.zero_()
        for part in self.read(last, 0, self.capacity):
            part.zero_()
        self.owners.pop()
        if len(self.owners) <= self.rows // 4:
            self._resize(len(self.owners))

    def read(self, row: int, start: int, stop: int) -> list[Tensor]:
        """Return views of a row's tokens, each (L, H, tokens, D)."""
        return [tensor[:, row, :, start:stop] for tensor in self._tensors]

    def write(self, row: int, start: int, parts: Sequence[Tensor]) -> None:
        """Set a row's tokens from `start` on."""
        for tensor, part in zip(self._tensors, parts, strict=True):
            tensor[:, row, :, start : start + part.shape[2]] = part

    def _resize(self, rows: int) -> None:
        if rows == self.rows:
            return
        grown = self.form.tensors(rows=rows, capacity=self.capacity)
        kept = len(self.owners)
        for old, new in zip(self._tensors, grown, strict=True):
            new[:, :kept] = old[:, :kept]
        self._tensors = grown
