"""Pages of zeros, and memory that goes back when nobody uses it."""

import ctypes
import random
from itertools import pairwise

import pytest

from loradeck.runner.page_pool import ALIGNMENT, SLAB, PagePool

PAGE = 1000  # bytes; not a multiple of the alignment


def fill(pool: PagePool, page: int) -> None:
    ctypes.memset(page, 0xFF, pool.page_bytes)


def is_zero(pool: PagePool, page: int) -> bool:
    return not any(ctypes.string_at(page, pool.page_bytes))


def test_pages_are_aligned_and_apart() -> None:
    pool = PagePool(PAGE, 3 * SLAB * 1024)
    assert pool.page_bytes == 1024
    pages = sorted(pool.take() for _ in range(pool.max_pages))
    assert len(pages) == 3 * SLAB
    assert not any(page % ALIGNMENT for page in pages)
    assert all(after - before >= pool.page_bytes for before, after in pairwise(pages))
    with pytest.raises(MemoryError, match="all 96 pages are in use"):
        pool.take()


def test_a_page_is_zeros_whoever_had_it() -> None:
    pool = PagePool(PAGE, 4 * 1024)
    pages = [pool.take() for _ in range(4)]
    for page in pages:
        fill(pool, page)
    for page in pages[1:]:
        pool.give_back(page)
    again = [pool.take() for _ in range(3)]
    assert {*again} == {*pages[1:]}
    assert all(is_zero(pool, page) for page in again)
    assert not is_zero(pool, pages[0])


@pytest.mark.parametrize("seed", range(3))
def test_whatever_comes_and_goes_memory_follows(seed: int) -> None:
    """Within the budget, and all of it in the end."""
    chance = random.Random(seed)
    pool = PagePool(PAGE, 1024 * (4 * SLAB + 5) + 77)
    used: dict[int, int] = {}
    for number in range(2000):
        growing = number // 400 % 2 == 0
        if pool.used < pool.max_pages and chance.random() < (0.7 if growing else 0.2):
            page = pool.take()
            assert page not in used
            assert is_zero(pool, page)
            used[page] = number % 251 + 1
            ctypes.memset(page, used[page], pool.page_bytes)
        elif used:
            page = chance.choice([*used])
            assert {*ctypes.string_at(page, pool.page_bytes)} == {used.pop(page)}
            pool.give_back(page)
        assert pool.used == len(used)
        assert pool.used * 1024 <= pool.nbytes <= 1024 * (4 * SLAB + 5)
    for page in used:
        pool.give_back(page)
    assert (pool.used, pool.nbytes) == (0, 0)


def test_the_newest_slabs_become_empty_first() -> None:
    pool = PagePool(PAGE, 1024 * 4 * SLAB)
    pages = [pool.take() for _ in range(4 * SLAB)]
    random.Random(0).shuffle(pages)
    while len(pages) > SLAB:  # a long burst ends, while others come and go
        pool.give_back(pages.pop(0))
        pool.give_back(pages.pop(0))
        pages.append(pool.take())
    for _ in range(20 * SLAB):
        pool.give_back(pages.pop(0))
        pages.append(pool.take())
    assert pool.nbytes == 1024 * SLAB
