"""Pages within a budget of bytes: shared when they are full, one request's own before, zeros when they are taken."""

import ctypes
from collections import Counter
from typing import TypeAlias

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from loradeck.runner.page_pool import SLAB
from loradeck.runner.paged_cache import PagedCache
from loradeck.runner.prefix_cache import BLOCK
from loradeck.runner.request import Key, Request
from loradeck.sampling import SamplingParams

PAGE = BLOCK * 8  # bytes: a number for each token
PAGES = 6
POET, PIRATE = (("poet", 1.0),), (("pirate", 1.0),)
Prefix: TypeAlias = tuple[Key, tuple[int, ...]]


def request(prompt: int, key: Key = POET, first: int = 0, **sampling) -> Request:
    return Request([first, *range(1, prompt)], SamplingParams(**sampling), key)


def cache_of(pages: int) -> PagedCache:
    return PagedCache(PAGE, pages * PAGE + PAGE // 2)


def pages(cache: PagedCache, own: Request, count: int) -> list[int]:
    return [*(ctypes.c_uint64 * count).from_address(cache.table(own))]


def numbers(page: int) -> "ctypes.Array[ctypes.c_uint64]":
    return (ctypes.c_uint64 * BLOCK).from_address(page)


def marks(own: Request) -> list[int]:
    """What a step may store of each token: it depends on the adapters and all tokens so far."""
    mark, found = hash(own.key), []
    for token in own.tokens:
        mark = hash((mark, token))
        found.append(mark % (1 << 64) or 1)
    return found


def compute(cache: PagedCache, own: Request, count: int | None = None) -> None:
    stop = own.computed + (own.pending if count is None else count)
    table, wanted = pages(cache, own, -(-stop // BLOCK)), marks(own)
    for index in range(own.computed, stop):
        numbers(table[index // BLOCK])[index % BLOCK] = wanted[index]
    own.computed = stop


def admitted(cache: PagedCache, own: Request) -> Request:
    """Compute all of a request's tokens."""
    assert cache.reserve(own, own.pending)
    compute(cache, own)
    return own


class Model(RuleBasedStateMachine):
    """Requests with few different beginnings, in a cache with room for some of them."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = cache_of(PAGES)
        self.live: list[Request] = []
        self.size: dict[Request, int] = {}  # pages of each
        self.shared: dict[Request, int] = {}  # how many of them are blocks
        self.known: set[Prefix] = set()
        self.idle: list[Prefix] = []  # in the order of eviction
        self.holders: Counter[Prefix] = Counter()

    # ---- what is expected

    def tables(self) -> dict[Request, list[int]]:
        return {own: pages(self.cache, own, self.size[own]) for own in self.live}

    def in_use(self) -> set[int]:
        return {page for table in self.tables().values() for page in table}

    def hold(self, prefix: Prefix) -> None:
        self.holders[prefix] += 1
        if prefix in self.idle:
            self.idle.remove(prefix)

    def reserve(self, own: Request, found: list[Prefix]) -> bool:
        count = -(-len(own.tokens) // BLOCK)
        more = count - self.size.get(own, len(found))
        running = len(self.in_use()) + len({*found} & {*self.idle})
        fits = running + more <= PAGES
        before = self.tables(), self.cache.row_bytes, self.cache.prefixes.nbytes, self.cache.prefixes.queries
        assert self.cache.reserve(own, len(own.tokens)) == fits
        if not fits:
            assert before == (
                self.tables(), self.cache.row_bytes, self.cache.prefixes.nbytes, self.cache.prefixes.queries,
            )  # fmt: skip
            return False
        for prefix in found:
            self.hold(prefix)
        while running + len(self.idle) + more > PAGES:
            self.known.remove(self.idle.pop(0))
        self.size[own] = count
        return True

    def keep(self, own: Request) -> None:
        for prefix in prefixes(own)[self.shared[own] : own.computed // BLOCK]:
            self.known.add(prefix)
            self.hold(prefix)
            self.shared[own] += 1

    # ---- what happens

    @rule(
        key=st.sampled_from([POET, PIRATE, ()]),
        parts=st.lists(st.integers(0, 1), min_size=1, max_size=5),
        rest=st.integers(0, BLOCK - 1),
        scored=st.booleans(),
    )
    def arrive(self, key: Key, parts: list[int], rest: int, scored: bool) -> None:
        tokens = [part for part in parts for _ in range(BLOCK)][: len(parts) * BLOCK - rest]
        own = Request(tokens, SamplingParams(prompt_logprobs=0 if scored else None), key)
        found: list[Prefix] = []
        for prefix in prefixes(own)[: (len(tokens) - 1) // BLOCK]:
            if prefix not in self.known or scored:
                break
            found.append(prefix)
        if self.reserve(own, found):
            self.live.append(own)
            self.shared[own] = len(found)
        assert own.computed == own.cached == self.shared.get(own, 0) * BLOCK

    @precondition(lambda self: self.live)
    @rule(data=st.data(), count=st.integers(1, 3 * BLOCK))
    def compute(self, data: st.DataObject, count: int) -> None:
        own = data.draw(st.sampled_from(self.live))
        compute(self.cache, own, min(count, own.pending))

    @precondition(lambda self: self.live)
    @rule(data=st.data(), count=st.integers(1, 2 * BLOCK), token=st.integers(0, 1))
    def grow(self, data: st.DataObject, count: int, token: int) -> None:
        own = data.draw(st.sampled_from(self.live))
        own.tokens += [token] * count
        if not self.reserve(own, []):
            del own.tokens[-count:]

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def keep_one(self, data: st.DataObject) -> None:
        own = data.draw(st.sampled_from(self.live))
        self.cache.keep(own)
        self.keep(own)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        own = data.draw(st.sampled_from(self.live))
        for index in range(own.computed, self.size[own] * BLOCK):  # a failed step leaves anything there
            numbers(pages(self.cache, own, self.size[own])[index // BLOCK])[index % BLOCK] = (1 << 64) - 1
        self.cache.release(own)
        self.keep(own)
        for prefix in reversed(prefixes(own)[: self.shared[own]]):
            self.holders[prefix] -= 1
            if not self.holders[prefix]:
                self.idle.append(prefix)
        self.live.remove(own)

    # ---- what holds

    @invariant()
    def each_request_reads_its_own(self) -> None:
        for own, table in self.tables().items():
            found = [number for page in table for number in numbers(page)]
            assert found[: own.computed] == marks(own)[: own.computed]
            assert not any(found[own.computed :])

    @invariant()
    def nobody_else_has_a_page_that_is_written_to(self) -> None:
        readers = Counter(page for table in self.tables().values() for page in table)
        for own, table in self.tables().items():
            assert all(readers[page] == 1 for page in table[own.computed // BLOCK :])

    @invariant()
    def memory_is_what_is_said(self) -> None:
        cache = self.cache
        assert cache.row_bytes == len(self.in_use()) * PAGE
        assert cache.prefixes.nbytes == len(self.idle) * PAGE
        assert cache.row_bytes + cache.prefixes.nbytes <= cache.nbytes <= cache.budget

    def teardown(self) -> None:
        while self.live:
            own = self.live.pop()
            self.cache.release(own)
        assert self.cache.row_bytes == 0
        assert all(not block.holders for block in self.cache.prefixes._blocks.values())
        self.cache.clear()
        assert (self.cache.nbytes, self.cache.prefixes.nbytes) == (0, 0)


def prefixes(own: Request) -> list[Prefix]:
    """The beginnings of a request that blocks may end."""
    return [(own.key, tuple(own.tokens[:stop])) for stop in range(BLOCK, len(own.tokens) + 1, BLOCK)]


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=60, stateful_step_count=40)


def test_the_longest_row() -> None:
    sizes = [(pages * PAGE + more) for pages, more in ((0, PAGE - 1), (1, 0), (5, PAGE - 1))]
    assert [PagedCache(PAGE, budget).max_tokens for budget in sizes] == [0, BLOCK, 5 * BLOCK]
    cache = cache_of(5)
    assert not cache.reserve(request(5 * BLOCK + 1), 5 * BLOCK + 1)
    admitted(cache, request(5 * BLOCK))


def test_a_prefix_is_shared_without_a_copy() -> None:
    cache = cache_of(8)
    own, again, scored = request(4 * BLOCK + 3), request(4 * BLOCK + 3), request(2 * BLOCK, prompt_logprobs=0)
    admitted(cache, own)
    cache.keep(own)
    assert cache.reserve(again, again.pending)
    assert (again.computed, again.cached) == (4 * BLOCK, 4 * BLOCK)
    assert pages(cache, again, 4) == pages(cache, own, 4)
    assert cache.row_bytes == 6 * PAGE
    assert cache.reserve(scored, scored.pending)
    assert (scored.computed, scored.cached) == (0, 0)
    assert (cache.prefixes.queries, cache.prefixes.hits) == (2 * (4 * BLOCK + 3), 4 * BLOCK)


def test_what_two_compute_at_the_same_time_is_stored_once() -> None:
    cache = cache_of(8)
    own, other = request(3 * BLOCK + 1), request(3 * BLOCK + 1)
    for each in (own, other):
        assert cache.reserve(each, each.pending)
    for each in (own, other):
        compute(cache, each)
    assert cache.row_bytes == 8 * PAGE
    cache.keep(own)
    cache.keep(other)
    assert cache.row_bytes == 5 * PAGE
    assert pages(cache, own, 3) == pages(cache, other, 3)


def test_prefixes_give_way_to_rows_the_last_of_the_oldest_first() -> None:
    cache = cache_of(8)
    for key in (POET, PIRATE):
        cache.release(admitted(cache, request(3 * BLOCK, key)))
    assert (cache.row_bytes, cache.prefixes.nbytes) == (0, 6 * PAGE)
    admitted(cache, request(4 * BLOCK, ()))
    assert cache.prefixes.nbytes == 4 * PAGE
    found = [len(cache.prefixes.find(request(3 * BLOCK + 1, key))) for key in (POET, PIRATE)]
    assert found == [1, 3]


def test_what_is_read_is_not_evicted() -> None:
    cache = cache_of(6)
    cache.release(admitted(cache, request(4 * BLOCK)))
    own = request(2 * BLOCK + 1)
    assert cache.reserve(own, own.pending)
    assert own.computed == 2 * BLOCK
    assert not cache.reserve(request(4 * BLOCK, PIRATE), 4 * BLOCK)
    assert cache.prefixes.nbytes == 2 * PAGE
    assert cache.reserve(request(3 * BLOCK, PIRATE), 3 * BLOCK)
    assert cache.prefixes.nbytes == 0


def test_a_prefix_does_not_give_way_to_the_request_that_starts_with_it() -> None:
    cache = cache_of(4)
    cache.release(admitted(cache, request(4 * BLOCK)))
    own = Request([*request(2 * BLOCK).tokens, *[7] * 3 * BLOCK], key=POET)
    assert not cache.reserve(own, own.pending)
    assert (own.computed, cache.prefixes.nbytes, cache.prefixes.queries) == (0, 4 * PAGE, 4 * BLOCK)
    del own.tokens[4 * BLOCK :]
    assert cache.reserve(own, own.pending)
    assert (own.computed, cache.prefixes.nbytes) == (2 * BLOCK, 0)


def test_the_last_token_is_computed() -> None:
    cache = cache_of(4)
    cache.release(admitted(cache, request(2 * BLOCK)))
    own = request(2 * BLOCK)
    assert cache.reserve(own, own.pending)
    assert own.computed == BLOCK


def test_what_a_request_computed_itself_was_not_cached_for_it() -> None:
    """It gave way in the middle of its prompt and comes again."""
    cache = cache_of(8)
    own = request(3 * BLOCK)
    assert cache.reserve(own, own.pending)
    own.admitted = 1.0
    compute(cache, own, 2 * BLOCK + 5)
    cache.release(own)
    own.computed = 0
    assert cache.reserve(own, own.pending)
    assert (own.computed, own.cached) == (2 * BLOCK, 0)


def test_memory_falls_after_a_burst() -> None:
    cache = cache_of(8 * SLAB)
    burst = [request(BLOCK - 1, first=first) for first in range(8 * SLAB)]
    for own in burst:
        admitted(cache, own)
    assert cache.nbytes == 8 * SLAB * PAGE
    for own in burst[1:]:
        cache.release(own)
    assert cache.nbytes == SLAB * PAGE
    cache.release(burst[0])
    assert cache.nbytes == 0


@pytest.mark.parametrize("live", [False, True])
def test_clear_frees_all(live: bool) -> None:
    cache = cache_of(8)
    own = admitted(cache, request(3 * BLOCK + 1))
    if not live:
        cache.release(own)
    cache.clear()
    assert (cache.nbytes, cache.row_bytes, cache.prefixes.nbytes) == (0, 0, 0)
    cache.release(own)  # it has no row any more
    again = request(3 * BLOCK + 1)
    assert cache.reserve(again, again.pending)
    assert again.computed == 0
