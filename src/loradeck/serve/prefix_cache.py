"""Keys and values of prompts' beginnings, kept for the next request that begins so. Knows adapters by hash only.

A block is found by the adapters' content, the block before it, and its own tokens, all compared in full: nothing is
ever found that another adapter computed (law 7). Blocks are copies: no row looks at memory that another writes to.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

from torch import Tensor

from loradeck.serve.request import Key

BLOCK = 32  # tokens of a block


@dataclass(frozen=True, slots=True)
class Block:
    """The keys and values of BLOCK tokens, and what later blocks know it by."""

    number: int
    parts: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


Place = tuple[Key, int, tuple[int, ...]]  # adapters, number of the block before (0: none), tokens


class PrefixCache:
    """Blocks, the least recently used of which go when others need their room."""

    def __init__(self) -> None:
        self._blocks: OrderedDict[Place, Block] = OrderedDict()
        self._numbers = count(1)
        self.nbytes = 0
        self.queries = 0
        """Tokens that were looked for."""
        self.hits = 0
        """Tokens that were found."""

    def find(self, key: Key, tokens: Sequence[int]) -> list[Block]:
        """Return the blocks that `tokens` begin with, in order. The last token is always left to be computed."""
        path: list[Place] = []
        found: list[Block] = []
        for part in _parts(tokens[:-1]):
            here = (key, found[-1].number if found else 0, part)
            block = self._blocks.get(here)
            if block is None:
                break
            path.append(here)
            found.append(block)
        self._used(path)
        self.queries += len(tokens)
        self.hits += len(found) * BLOCK
        return found

    def keep(self, key: Key, tokens: Sequence[int], read: Callable[[int, int], Sequence[Tensor]], room: int) -> None:
        """Keep the blocks of computed tokens, in `room` bytes for all blocks; `read(start, stop)` shows them."""
        path: list[Place] = []
        before = 0
        for index, part in enumerate(_parts(tokens)):
            here = (key, before, part)
            block = self._blocks.get(here)
            if block is None:
                views = read(index * BLOCK, (index + 1) * BLOCK)
                nbytes = sum(view.nbytes for view in views)
                if (index + 1) * nbytes > room:
                    break  # its end would drive out its beginning
                self.shrink(room - nbytes)
                block = self._blocks[here] = Block(next(self._numbers), tuple(view.clone() for view in views))
                self.nbytes += block.nbytes
            self._blocks.move_to_end(here)
            path.append(here)
            before = block.number
        self._used(path)

    def shrink(self, most: int) -> None:
        """Drop blocks until they take `most` bytes."""
        while self.nbytes > most and self._blocks:
            _, block = self._blocks.popitem(last=False)
            self.nbytes -= block.nbytes

    def _used(self, path: Sequence[Place]) -> None:
        for place in reversed(path):  # the first block last, so that it outlives those that need it
            self._blocks.move_to_end(place)


def _parts(tokens: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the whole blocks of some tokens."""
    whole = len(tokens) // BLOCK * BLOCK
    return [tuple(tokens[at : at + BLOCK]) for at in range(0, whole, BLOCK)]
