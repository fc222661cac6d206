"""Keys and values in pages, within a budget of bytes: those of running requests, and of prefixes.

A page holds BLOCK tokens of one request in all layers; how they lie in it is the business of the step that computes
them (`native`). A full page is never written to again, so requests with the same beginning share it.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from loradeck.runner.page_pool import PagePool
from loradeck.runner.prefix_cache import BLOCK, Block, PrefixCache
from loradeck.runner.request import Request


@dataclass(eq=False, slots=True)
class Row:
    """The pages of one request."""

    pages: "array[int]" = field(default_factory=lambda: array("Q"))
    """Their addresses, in the order of the tokens: 64 bits each."""
    blocks: list[Block[int]] = field(default_factory=list)
    """Those of the first pages, which others may read too. The pages after them are the request's own."""


class PagedCache:
    """The keys and values of all running requests, and of prefixes. A page counts once, whoever shares it."""

    def __init__(self, page_bytes: int, budget: int) -> None:
        """`page_bytes` is the size of a page, `budget` that of all pages together."""
        self.budget = budget
        self._pool = PagePool(page_bytes, budget)
        self.prefixes: PrefixCache[int] = PrefixCache(self._pool.page_bytes)
        self._rows: dict[Request, Row] = {}

    @property
    def row_bytes(self) -> int:
        """Bytes of the pages of running requests."""
        return self._pool.used * self._pool.page_bytes - self.prefixes.nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of memory: of rows, of prefixes, and of pages that are free but lie beside pages in use."""
        return self._pool.nbytes

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest row that fits the budget; 0 if none fits."""
        return self._pool.max_pages * BLOCK

    def table(self, request: Request) -> int:
        """Return the address of the addresses of a request's pages, until the request's next `reserve` or `keep`."""
        return self._rows[request].pages.buffer_info()[0]

    def pages(self, request: Request) -> Sequence[int]:
        """Return the addresses of a request's pages."""
        return self._rows[request].pages

    def reserve(self, request: Request, tokens: int) -> bool:
        """Make room for this many tokens of a request. If there is none, return False and change nothing.

        Room for more tokens is given back. A new row starts with the known prefix of the prompt; `request.computed`
        says how long that is.
        """
        row = self._rows.get(request)
        prefix = self.prefixes.find(request) if row is None else []
        count = -(-tokens // BLOCK) - len(prefix if row is None else row.pages)
        idle = self.prefixes.nbytes - sum(not block.holders for block in prefix) * self._pool.page_bytes
        room = self.budget - self._pool.used * self._pool.page_bytes
        needed = count * self._pool.page_bytes
        if needed > room + idle:
            return False
        if row is None:
            row = self._rows[request] = Row(array("Q", [block.payload for block in prefix]), prefix)
            self.prefixes.start(request, prefix)
        for page in self.prefixes.shrink(idle - max(0, needed - room)):
            self._pool.give_back(page)
        row.pages.extend(self._pool.take() for _ in range(count))
        for _ in range(-count):
            self._pool.give_back(row.pages.pop())
        return True

    def release(self, request: Request) -> None:
        """Take a request's row back, if it has one; whole pages of what it computed are kept for others."""
        if request in self._rows:
            self.keep(request)
            row = self._rows.pop(request)
            self.prefixes.release(row.blocks)
            for page in row.pages[len(row.blocks) :]:
                self._pool.give_back(page)

    def keep(self, request: Request) -> None:
        """Keep what a request has computed for others with the same prefix."""
        row = self._rows[request]
        start = len(row.blocks)
        self.prefixes.keep(request, request.computed, row.blocks, row.pages.__getitem__)
        for index, block in enumerate(row.blocks[start:], start):
            if block.payload != row.pages[index]:  # another request has computed the same at the same time
                self._pool.give_back(row.pages[index])
                row.pages[index] = block.payload

    def clear(self) -> None:
        """Free all memory."""
        for request in [*self._rows]:
            self.release(request)
        for page in self.prefixes.shrink(0):
            self._pool.give_back(page)
