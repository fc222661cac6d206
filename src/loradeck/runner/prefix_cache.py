"""Keys and values of prompts' beginnings, kept for later requests that begin the same.

A block is found by the adapters' content hashes, the block before it and its own tokens, all compared in full: no
request ever gets what another adapter computed (invariant 7, docs/invariants.md). What a block holds is its cache's
business, as long as nobody writes to it: `KVCache` copies rows, `PagedCache` shares pages.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Generic, TypeAlias, TypeVar

from loradeck.native.pages import PAGE
from loradeck.runner.request import Key, Request

BLOCK = PAGE  # tokens: requests with the same beginning share whole pages
Payload = TypeVar("Payload")
BlockKey: TypeAlias = tuple[Key, int, tuple[int, ...]]
"""Adapters, number of the block before (0: none), tokens."""


@dataclass(eq=False, slots=True)
class Block(Generic[Payload]):
    """The keys and values of BLOCK tokens, and the number by which later blocks refer to it."""

    key: BlockKey
    number: int
    payload: Payload
    holders: int = 0
    """How many hold it; it is not evicted before they release it."""


class PrefixCache(Generic[Payload]):
    """Blocks; of those that nobody holds, the least recently used are evicted when memory is needed.

    Who holds a block holds those before it. They are released together, the last one first, so that a block is never
    evicted before those that need it.
    """

    def __init__(self, block_bytes: int) -> None:
        self.block_bytes = block_bytes
        self.queries = 0
        """Tokens looked up."""
        self.hits = 0
        """Tokens found."""
        self._blocks: dict[BlockKey, Block[Payload]] = {}
        self._idle: OrderedDict[Block[Payload], None] = OrderedDict()
        self._numbers = count(1)

    @property
    def nbytes(self) -> int:
        """Bytes of the blocks that nobody holds."""
        return len(self._idle) * self.block_bytes

    def find(self, request: Request) -> list[Block[Payload]]:
        """Return the blocks that a request's tokens begin with, in order. Its last token is left to be computed."""
        blocks: list[Block[Payload]] = []
        if request.sampling.prompt_logprobs is not None:
            return blocks  # they come from computing the prompt
        for index in range((len(request.tokens) - 1) // BLOCK):
            block = self._blocks.get(_key(request, index, blocks))
            if block is None:
                break
            blocks.append(block)
        return blocks

    def start(self, request: Request, blocks: Sequence[Block[Payload]]) -> None:
        """Let a request start with the blocks that were found for it, and hold them."""
        self._hold(blocks)
        if request.sampling.prompt_logprobs is None:
            self.queries += len(request.tokens)
            self.hits += len(blocks) * BLOCK
        request.computed = len(blocks) * BLOCK
        if not request.admitted:  # otherwise it was preempted, and the prefix may be its own
            request.cached = request.computed

    def keep(
        self, request: Request, stop: int, blocks: list[Block[Payload]], payload: Callable[[int], Payload]
    ) -> None:
        """Extend the first blocks of a request, which it holds, by those up to token `stop`, and hold them too.

        `payload(index)` makes what a new block holds.
        """
        for index in range(len(blocks), stop // BLOCK):
            key = _key(request, index, blocks)
            block = self._blocks.get(key)
            if block is None:
                block = self._blocks[key] = Block(key, next(self._numbers), payload(index))
            self._hold([block])
            blocks.append(block)

    def release(self, blocks: Sequence[Block[Payload]]) -> None:
        """Undo one holding of a request's blocks, which are the most recently used ones now."""
        for block in reversed(blocks):
            block.holders -= 1
            if not block.holders:
                self._idle[block] = None

    def shrink(self, max_bytes: int) -> list[Payload]:
        """Evict blocks that nobody holds until they take at most `max_bytes`. Return what they held."""
        payloads = []
        while self.nbytes > max_bytes and self._idle:
            block, _ = self._idle.popitem(last=False)
            del self._blocks[block.key]
            payloads.append(block.payload)
        return payloads

    def _hold(self, blocks: Iterable[Block[Payload]]) -> None:
        for block in blocks:
            self._idle.pop(block, None)
            block.holders += 1


def _key(request: Request, index: int, before: Sequence[Block[Payload]]) -> BlockKey:
    tokens = request.tokens[index * BLOCK : (index + 1) * BLOCK]
    return request.key, before[-1].number if before else 0, tuple(tokens)
