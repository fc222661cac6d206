"""Keys and values within a budget of bytes: rows that are being computed, and prefixes kept for later. Knows no model.

A row lies in a pool of rows of its capacity, a power of two, and moves to the next pool when it outgrows it. What the
rows leave of the budget is the prefixes'.
"""

from loradeck.serve.pool import Form, Pool
from loradeck.serve.prefix_cache import BLOCK, PrefixCache
from loradeck.serve.request import Request

SMALLEST = 128  # tokens; below, moves would cost more than the memory is worth


class KVCache:
    """Where every running request's keys and values lie."""

    def __init__(self, form: Form, budget: int) -> None:
        """`budget` is in bytes, for rows and prefixes together."""
        self.form = form
        self.budget = budget
        self.prefixes = PrefixCache()
        self._pools: dict[int, Pool[Request]] = {}
        self._places: dict[Request, tuple[Pool[Request], int]] = {}

    @property
    def row_bytes(self) -> int:
        """Bytes of all pools."""
        return sum(pool.rows * pool.row_bytes for pool in self._pools.values())

    @property
    def nbytes(self) -> int:
        """Bytes of rows and prefixes."""
        return self.row_bytes + self.prefixes.nbytes

    @property
    def longest(self) -> int:
        """Tokens of the longest row that the budget can hold."""
        capacity = SMALLEST
        while self.form.token_bytes * capacity * 2 <= self.budget:
            capacity *= 2
        return capacity if self.form.token_bytes * capacity <= self.budget else 0

    def place(self, request: Request) -> tuple[Pool[Request], int]:
        """Return the pool of a request's row, and its number there."""
        return self._places[request]

    def reserve(self, request: Request, tokens: int) -> bool:
        """Give a request room for so many tokens, and say whether there is any; without, nothing changes.

        A new row begins with what the prefixes know of its prompt, and `request.computed` says how much that is.
        """
        known = self._places.get(request)
        if known is not None and known[0].capacity >= tokens:
            return True
        capacity = SMALLEST
        while capacity < tokens:
            capacity *= 2
        pool = self._pools.get(capacity) or Pool(self.form, capacity)
        leaves = known[0].rows * known[0].row_bytes if known is not None and len(known[0].owners) == 1 else 0
        room = self.budget - self.row_bytes + leaves
        rows = pool.next_rows(room // pool.row_bytes)
        if rows == len(pool.owners):
            return False
        self.prefixes.shrink(room - (rows - pool.rows) * pool.row_bytes)
        self._pools[capacity] = pool
        row = pool.add(request, rows)
        if known is not None:
            pool.write(row, 0, known[0].read(known[1], 0, request.computed))
            self._leave(*known)
        self._places[request] = pool, row
        if known is None:
            self._recall(request)
        return True

    def release(self, request: Request) -> None:
        """Take a request's row back, if it has one; whole blocks of what it computed stay for others."""
        if request in self._places:
            self.keep(request)
            self._leave(*self._places.pop(request))

    def keep(self, request: Request) -> None:
        """Keep what a request has computed for others that begin so."""
        pool, row = self._places[request]
        self.prefixes.keep(
            request.key,
            request.tokens[: request.computed],
            lambda start, stop: pool.read(row, start, stop),
            self.budget - self.row_bytes,
        )

    def clear(self) -> None:
        """Give all memory back."""
        self.prefixes.shrink(0)
        self._places.clear()
        self._pools.clear()

    def _recall(self, request: Request) -> None:
        if request.sampling.prompt_logprobs is not None:
            return  # they come from computing the prompt
        pool, row = self._places[request]
        blocks = self.prefixes.find(request.key, request.tokens)
        for index, block in enumerate(blocks):
            pool.write(row, index * BLOCK, block.parts)
        request.computed = len(blocks) * BLOCK
        if not request.admitted:  # else it gave way, and may find what it left itself
            request.cached = request.computed

    def _leave(self, pool: Pool[Request], row: int) -> None:
        pool.remove(row, pool.owners[-1].computed)
        if row < len(pool.owners):
            self._places[pool.owners[row]] = pool, row
        if not pool.owners:
            self._pools.pop(pool.capacity)
