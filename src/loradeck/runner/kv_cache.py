"""Keys and values within a budget of bytes: the running requests' rows, and prefixes kept for later requests.

A row lies in a pool of rows of its capacity, a power of two, and moves to the next pool when it outgrows it. The
prefixes get what the rows leave of the budget.

L layers of one shape   N rows   H key heads   C capacity, in tokens   D width of a head
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import Tensor

from loradeck.runner.prefix_cache import BLOCK, Block, PrefixCache
from loradeck.runner.request import Request

MIN_CAPACITY = 128  # tokens; for smaller rows, moving costs more than the memory is worth
Owner = TypeVar("Owner")


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer stores of a token: H heads of keys and values of these widths."""

    heads: int
    key_width: int
    value_width: int


@dataclass(frozen=True)
class KVLayout:
    """What a model stores of a token. Layers of one shape share a tensor, because they are copied together."""

    layers: tuple[LayerShape, ...]
    dtype: torch.dtype
    device: torch.device
    shapes: tuple[LayerShape, ...] = field(init=False)
    indices: tuple[tuple[int, int], ...] = field(init=False)
    """Of each layer: the index of its shape, and its index among the layers of that shape."""

    def __post_init__(self) -> None:
        shapes = tuple(dict.fromkeys(self.layers))
        counts = dict.fromkeys(shapes, 0)
        indices = []
        for layer in self.layers:
            indices.append((shapes.index(layer), counts[layer]))
            counts[layer] += 1
        object.__setattr__(self, "shapes", shapes)
        object.__setattr__(self, "indices", tuple(indices))

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        return sum(layer.heads * (layer.key_width + layer.value_width) for layer in self.layers) * self.dtype.itemsize

    def zeros(self, *, rows: int, capacity: int) -> list[Tensor]:
        """Return tensors (L, N, H, C, D) for keys and values, of each shape in turn."""
        return [
            torch.zeros(
                self.layers.count(shape), rows, shape.heads, capacity, width, dtype=self.dtype, device=self.device
            )
            for shape in self.shapes
            for width in (shape.key_width, shape.value_width)
        ]


class Pool(Generic[Owner]):
    """Rows of one capacity, which attention reads in place.

    Rows 0 to len(owners) - 1 are in use, without gaps, so that a batch of all of them is a view. What no owner has
    written is zero: attention gives it no weight, but 0 · NaN of an earlier owner would be NaN.
    """

    def __init__(self, layout: KVLayout, capacity: int) -> None:
        self.layout = layout
        self.capacity = capacity
        self.owners: list[Owner] = []
        self._tensors = layout.zeros(rows=0, capacity=capacity)

    @property
    def rows(self) -> int:
        """Rows that memory is allocated for."""
        return self._tensors[0].shape[1]

    @property
    def row_bytes(self) -> int:
        return self.layout.token_bytes * self.capacity

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return a layer's keys and values, each (N, H, C, D)."""
        shape, index = self.layout.indices[layer]
        return self._tensors[2 * shape][index], self._tensors[2 * shape + 1][index]

    def rows_with_one_more(self, max_new: int) -> int:
        """Return how many rows to allocate for one more owner: half as many again, but at most `max_new` new ones."""
        return self.rows if len(self.owners) < self.rows else self.rows + min(max(1, self.rows // 2), max_new)

    def add(self, owner: Owner, rows: int) -> int:
        """Give a row to `owner`, with `rows` rows allocated, and return its index."""
        self._resize(rows)
        self.owners.append(owner)
        return len(self.owners) - 1

    def remove(self, row: int, length: int) -> None:
        """Take a row back. The last row, which holds `length` tokens, moves there."""
        last = len(self.owners) - 1
        if row != last:
            self.write(row, 0, self.read(last, 0, length))
            self.owners[row] = self.owners[last]
            for tensor in self.read(row, length, self.capacity):
                tensor.zero_()
        for tensor in self.read(last, 0, self.capacity):
            tensor.zero_()
        self.owners.pop()
        if len(self.owners) <= self.rows // 4:
            self._resize(len(self.owners))

    def read(self, row: int, start: int, stop: int) -> list[Tensor]:
        """Return views of a row's tokens, each (L, H, tokens, D)."""
        return [tensor[:, row, :, start:stop] for tensor in self._tensors]

    def write(self, row: int, start: int, tensors: Sequence[Tensor]) -> None:
        """Write a row's tokens from `start` on."""
        for target, source in zip(self._tensors, tensors, strict=True):
            target[:, row, :, start : start + source.shape[2]] = source

    def _resize(self, rows: int) -> None:
        if rows == self.rows:
            return
        used = len(self.owners)
        tensors = self.layout.zeros(rows=rows, capacity=self.capacity)
        for old, new in zip(self._tensors, tensors, strict=True):
            new[:, :used] = old[:, :used]
        self._tensors = tensors


class KVCache:
    """The keys and values of all running requests, and of prefixes."""

    def __init__(self, layout: KVLayout, budget: int) -> None:
        """`budget` is in bytes, for rows and prefixes together."""
        self.layout = layout
        self.budget = budget
        self.prefixes: PrefixCache[list[Tensor]] = PrefixCache(layout.token_bytes * BLOCK)
        self._pools: dict[int, Pool[Request]] = {}
        self._rows: dict[Request, tuple[Pool[Request], int]] = {}

    @property
    def row_bytes(self) -> int:
        """Bytes of all pools."""
        return sum(pool.nbytes for pool in self._pools.values())

    @property
    def nbytes(self) -> int:
        """Bytes of rows and prefixes."""
        return self.row_bytes + self.prefixes.nbytes

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest row that fits the budget; 0 if none fits."""
        capacity = MIN_CAPACITY
        while self.layout.token_bytes * capacity * 2 <= self.budget:
            capacity *= 2
        return capacity if self.layout.token_bytes * capacity <= self.budget else 0

    def row(self, request: Request) -> tuple[Pool[Request], int]:
        """Return the pool of a request's row and the row's index there."""
        return self._rows[request]

    def reserve(self, request: Request, tokens: int) -> bool:
        """Make room for this many tokens of a request. If there is none, return False and change nothing.

        A new row starts with the known prefix of the prompt; `request.computed` says how long that is.
        """
        old = self._rows.get(request)
        if old is not None and old[0].capacity >= tokens:
            return True
        capacity = MIN_CAPACITY
        while capacity < tokens:
            capacity *= 2
        pool = self._pools.get(capacity) or Pool(self.layout, capacity)
        freed = old[0].nbytes if old is not None and len(old[0].owners) == 1 else 0
        room = self.budget - self.row_bytes + freed
        rows = pool.rows_with_one_more(room // pool.row_bytes)
        if rows == len(pool.owners):
            return False
        self.prefixes.shrink(room - (rows - pool.rows) * pool.row_bytes)
        self._pools[capacity] = pool
        row = pool.add(request, rows)
        if old is not None:
            pool.write(row, 0, old[0].read(old[1], 0, request.computed))
            self._remove(*old)
        self._rows[request] = pool, row
        if old is None:
            self._restore_prefix(request)
        return True

    def release(self, request: Request) -> None:
        """Take a request's row back, if it has one; whole blocks of what it computed are kept for others."""
        if request in self._rows:
            self.keep(request)
            self._remove(*self._rows.pop(request))

    def keep(self, request: Request) -> None:
        """Keep what a request has computed for others with the same prefix."""
        pool, row = self._rows[request]
        room = self.budget - self.row_bytes
        size = self.prefixes.block_bytes

        def copy(index: int) -> list[Tensor]:
            self.prefixes.shrink(room - (index + 1) * size)
            return [view.clone() for view in pool.read(row, index * BLOCK, (index + 1) * BLOCK)]

        blocks: list[Block[list[Tensor]]] = []
        stop = min(request.computed, room // size * BLOCK)  # the end of a prompt does not evict its beginning
        self.prefixes.keep(request, stop, blocks, copy)
        self.prefixes.release(blocks)

    def clear(self) -> None:
        """Free all memory."""
        self.prefixes.shrink(0)
        self._rows.clear()
        self._pools.clear()

    def _restore_prefix(self, request: Request) -> None:
        pool, row = self._rows[request]
        blocks = self.prefixes.find(request)
        for index, block in enumerate(blocks):
            pool.write(row, index * BLOCK, block.payload)
        self.prefixes.start(request, blocks)
        self.prefixes.release(blocks)

    def _remove(self, pool: Pool[Request], row: int) -> None:
        pool.remove(row, pool.owners[-1].computed)
        if row < len(pool.owners):
            self._rows[pool.owners[row]] = pool, row
        if not pool.owners:
            self._pools.pop(pool.capacity)
