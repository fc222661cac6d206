"""Keys and values of prompts' beginnings, kept for later requests that begin the same.

A block is found by the adapters' content hashes, the block before it and its own tokens, all compared in full: no
request ever gets what another adapter computed (invariant 7, docs/invariants.md). Blocks are copies: no row reads
memory that another row writes to.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TypeAlias

from torch import Tensor

from loradeck.runner.request import Key

BLOCK = 32  # tokens


@dataclass(frozen=True, slots=True)
class Block:
    """The keys and values of BLOCK tokens, and the number by which later blocks refer to it."""

    number: int
    tensors: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


BlockKey: TypeAlias = tuple[Key, int, tuple[int, ...]]
"""Adapters, number of the block before (0: none), tokens."""


class PrefixCache:
    """Blocks; the least recently used are evicted when memory is needed."""

    def __init__(self) -> None:
        self._blocks: OrderedDict[BlockKey, Block] = OrderedDict()
        self._numbers = count(1)
        self.nbytes = 0
        self.queries = 0
        """Tokens looked up."""
        self.hits = 0
        """Tokens found."""

    def find(self, key: Key, tokens: Sequence[int]) -> list[Block]:
        """Return the blocks that `tokens` begin with, in order. The last token is always left to be computed."""
        path: list[BlockKey] = []
        blocks: list[Block] = []
        for part in _split(tokens[:-1]):
            block_key = (key, blocks[-1].number if blocks else 0, part)
            block = self._blocks.get(block_key)
            if block is None:
                break
            path.append(block_key)
            blocks.append(block)
        self._touch(path)
        self.queries += len(tokens)
        self.hits += len(blocks) * BLOCK
        return blocks

    def keep(self, key: Key, tokens: Sequence[int], read: Callable[[int, int], Sequence[Tensor]], room: int) -> None:
        """Keep the blocks of computed tokens. `read(start, stop)` returns views; all blocks together fit in `room`."""
        path: list[BlockKey] = []
        before = 0
        for index, part in enumerate(_split(tokens)):
            block_key = (key, before, part)
            block = self._blocks.get(block_key)
            if block is None:
                views = read(index * BLOCK, (index + 1) * BLOCK)
                nbytes = sum(view.nbytes for view in views)
                if (index + 1) * nbytes > room:
                    break  # the end of the prompt would evict its beginning
                self.shrink(room - nbytes)
                block = self._blocks[block_key] = Block(next(self._numbers), tuple(view.clone() for view in views))
                self.nbytes += block.nbytes
            self._blocks.move_to_end(block_key)
            path.append(block_key)
            before = block.number
        self._touch(path)

    def shrink(self, max_bytes: int) -> None:
        """Evict blocks until they take at most `max_bytes`."""
        while self.nbytes > max_bytes and self._blocks:
            _, block = self._blocks.popitem(last=False)
            self.nbytes -= block.nbytes

    def _touch(self, path: Sequence[BlockKey]) -> None:
        for block_key in reversed(path):  # the first block last, so that it outlives those that need it
            self._blocks.move_to_end(block_key)


def _split(tokens: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the whole blocks of some tokens."""
    end = len(tokens) // BLOCK * BLOCK
    return [tuple(tokens[start : start + BLOCK]) for start in range(0, end, BLOCK)]
