"""Pages of memory, all of one size, within a budget of bytes."""

import ctypes
import heapq
from dataclasses import dataclass
from itertools import count
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap

ALIGNMENT = 64  # bytes
SLAB = 32  # pages


@dataclass(eq=False, slots=True)
class Slab:
    """Memory of several pages, which the system has back when the slab is dropped."""

    memory: mmap
    used: int = 0
    """How many of its pages are in use."""


class PagePool:
    """Gives out pages by their addresses, and takes them back.

    Free pages of old slabs are taken first, so that new slabs become empty and are dropped.
    """

    def __init__(self, page_bytes: int, budget: int) -> None:
        """`page_bytes` is rounded up to a multiple of ALIGNMENT; `budget` is in bytes, for all slabs together."""
        self.page_bytes = -(-page_bytes // ALIGNMENT) * ALIGNMENT
        self.max_pages = budget // self.page_bytes
        self._numbers = count()
        self._slabs: dict[int, Slab] = {}
        self._taken: dict[int, int] = {}
        """Of each page in use: the number of its slab."""
        self._free: list[tuple[int, int]] = []
        """A heap of slab numbers and free pages. Pages of slabs that were dropped leave it when they come up."""

    @property
    def used(self) -> int:
        """How many pages are in use."""
        return len(self._taken)

    @property
    def nbytes(self) -> int:
        """Bytes of all slabs."""
        return sum(len(slab.memory) for slab in self._slabs.values())

    def take(self) -> int:
        """Return the address of a page of zeros, a multiple of ALIGNMENT.

        Raises:
            MemoryError: all pages are in use.
        """
        while self._free and self._free[0][0] not in self._slabs:
            heapq.heappop(self._free)
        if not self._free:
            self._add_slab()
        number, page = heapq.heappop(self._free)
        self._taken[page] = number
        self._slabs[number].used += 1
        ctypes.memset(page, 0, self.page_bytes)
        return page

    def give_back(self, page: int) -> None:
        """Take a page back."""
        number = self._taken.pop(page)
        slab = self._slabs[number]
        slab.used -= 1
        if slab.used:
            heapq.heappush(self._free, (number, page))
        else:
            del self._slabs[number]

    def _add_slab(self) -> None:
        """Add a slab; all pages of the others are in use."""
        pages = min(SLAB, self.max_pages - self.used)
        if not pages:
            raise MemoryError(f"all {self.max_pages} pages are in use")
        memory = mmap(-1, pages * self.page_bytes, MAP_PRIVATE | MAP_ANONYMOUS)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        number = next(self._numbers)
        self._slabs[number] = Slab(memory)
        self._free = [(number, start + index * self.page_bytes) for index in range(pages)]  # sorted, so a heap
