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


def pages(cache: PagedCache, subject: Request, count: int) -> list[int]:
    return [*(ctypes.c_uint64 * count).from_address(cache.table(subject))]


def numbers(page: int) -> "ctypes.Array[ctypes.c_uint64]":
    return (ctypes.c_uint64 * BLOCK).from_address(page)


def marks(subject: Request) -> list[int]:
    """What a step may store of each token: it depends on the adapters and all tokens so far."""
    mark, values = hash(subject.key), []
    for token in subject.tokens:
        mark = hash((mark, token))
        values.append(mark % (1 << 64) or 1)
    return values


def compute(cache: PagedCache, subject: Request, count: int | None = None) -> None:
    stop = subject.computed + (subject.pending if count is None else count)
    table, wanted = pages(cache, subject, -(-stop // BLOCK)), marks(subject)
    for index in range(subject.computed, stop):
        numbers(table[index // BLOCK])[index % BLOCK] = wanted[index]
    subject.computed = stop


def admitted(cache: PagedCache, subject: Request) -> Request:
    """Compute all of a request's tokens."""
    assert cache.reserve(subject, subject.pending)
    compute(cache, subject)
    return subject


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
        return {subject: pages(self.cache, subject, self.size[subject]) for subject in self.live}

    def in_use(self) -> set[int]:
        return {page for table in self.tables().values() for page in table}

    def hold(self, prefix: Prefix) -> None:
        self.holders[prefix] += 1
        if prefix in self.idle:
            self.idle.remove(prefix)

    def reserve(self, subject: Request, found: list[Prefix]) -> bool:
        count = -(-len(subject.tokens) // BLOCK)
        more = count - self.size.get(subject, len(found))
        running = len(self.in_use()) + len({*found} & {*self.idle})
        fits = running + more <= PAGES
        before = self.tables(), self.cache.row_bytes, self.cache.prefixes.nbytes, self.cache.prefixes.queries
        assert self.cache.reserve(subject, len(subject.tokens)) == fits
        if not fits:
            assert before == (
                self.tables(), self.cache.row_bytes, self.cache.prefixes.nbytes, self.cache.prefixes.queries,
            )  # fmt: skip
            return False
        for prefix in found:
            self.hold(prefix)
        while running + len(self.idle) + more > PAGES:
            self.known.remove(self.idle.pop(0))
        self.size[subject] = count
        return True

    def keep(self, subject: Request) -> None:
        for prefix in prefixes(subject)[self.shared[subject] : subject.computed // BLOCK]:
            self.known.add(prefix)
            self.hold(prefix)
            self.shared[subject] += 1

    # ---- what happens

    @rule(
        key=st.sampled_from([POET, PIRATE, ()]),
        parts=st.lists(st.integers(0, 1), min_size=1, max_size=5),
        rest=st.integers(0, BLOCK - 1),
        scored=st.booleans(),
    )
    def arrive(self, key: Key, parts: list[int], rest: int, scored: bool) -> None:
        tokens = [part for part in parts for _ in range(BLOCK)][: len(parts) * BLOCK - rest]
        subject = Request(tokens, SamplingParams(prompt_logprobs=0 if scored else None), key)
        found: list[Prefix] = []
        for prefix in prefixes(subject)[: (len(tokens) - 1) // BLOCK]:
            if prefix not in self.known or scored:
                break
            found.append(prefix)
        if self.reserve(subject, found):
            self.live.append(subject)
            self.shared[subject] = len(found)
        assert subject.computed == subject.cached == self.shared.get(subject, 0) * BLOCK

    @precondition(lambda self: self.live)
    @rule(data=st.data(), count=st.integers(1, 3 * BLOCK))
    def compute(self, data: st.DataObject, count: int) -> None:
        subject = data.draw(st.sampled_from(self.live))
        compute(self.cache, subject, min(count, subject.pending))

    @precondition(lambda self: self.live)
    @rule(data=st.data(), count=st.integers(1, 2 * BLOCK), token=st.integers(0, 1))
    def grow(self, data: st.DataObject, count: int, token: int) -> None:
        subject = data.draw(st.sampled_from(self.live))
        subject.tokens += [token] * count
        if not self.reserve(subject, []):
            del subject.tokens[-count:]

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def keep_one(self, data: st.DataObject) -> None:
        subject = data.draw(st.sampled_from(self.live))
        self.cache.keep(subject)
        self.keep(subject)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        subject = data.draw(st.sampled_from(self.live))
        for index in range(subject.computed, self.size[subject] * BLOCK):  # a failed step leaves anything there
            numbers(pages(self.cache, subject, self.size[subject])[index // BLOCK])[index % BLOCK] = (1 << 64) - 1
        self.cache.release(subject)
        self.keep(subject)
        for prefix in reversed(prefixes(subject)[: self.shared[subject]]):
            self.holders[prefix] -= 1
            if not self.holders[prefix]:
                self.idle.append(prefix)
        self.live.remove(subject)

    # ---- what holds

    @invariant()
    def each_request_reads_its_own(self) -> None:
        for subject, table in self.tables().items():
            values = [number for page in table for number in numbers(page)]
            assert values[: subject.computed] == marks(subject)[: subject.computed]
            assert not any(values[subject.computed :])

    @invariant()
    def nobody_else_has_a_page_that_is_written_to(self) -> None:
        readers = Counter(page for table in self.tables().values() for page in table)
        for subject, table in self.tables().items():
            assert all(readers[page] == 1 for page in table[subject.computed // BLOCK :])

    @invariant()
    def memory_is_what_is_said(self) -> None:
        cache = self.cache
        assert cache.row_bytes == len(self.in_use()) * PAGE
        assert cache.prefixes.nbytes == len(self.idle) * PAGE
        assert cache.row_bytes + cache.prefixes.nbytes <= cache.nbytes <= cache.budget

    def teardown(self) -> None:
        while self.live:
            subject = self.live.pop()
            self.cache.release(subject)
        assert self.cache.row_bytes == 0
        assert all(not block.holders for block in self.cache.prefixes._blocks.values())
        self.cache.clear()
        assert (self.cache.nbytes, self.cache.prefixes.nbytes) == (0, 0)


def prefixes(subject: Request) -> list[Prefix]:
    """The beginnings of a request that blocks may end."""
    return [(subject.key, tuple(subject.tokens[:stop])) for stop in range(BLOCK, len(subject.tokens) + 1, BLOCK)]


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
    subject, again, scored = request(4 * BLOCK + 3), request(4 * BLOCK + 3), request(2 * BLOCK, prompt_logprobs=0)
    admitted(cache, subject)
    cache.keep(subject)
    assert cache.reserve(again, again.pending)
    assert (again.computed, again.cached) == (4 * BLOCK, 4 * BLOCK)
    assert pages(cache, again, 4) == pages(cache, subject, 4)
    assert cache.row_bytes == 6 * PAGE
    assert cache.reserve(scored, scored.pending)
    assert (scored.computed, scored.cached) == (0, 0)
    assert (cache.prefixes.queries, cache.prefixes.hits) == (2 * (4 * BLOCK + 3), 4 * BLOCK)


def test_what_two_compute_at_the_same_time_is_stored_once() -> None:
    cache = cache_of(8)
    subject, other = request(3 * BLOCK + 1), request(3 * BLOCK + 1)
    for each in (subject, other):
        assert cache.reserve(each, each.pending)
    for each in (subject, other):
        compute(cache, each)
    assert cache.row_bytes == 8 * PAGE
    cache.keep(subject)
    cache.keep(other)
    assert cache.row_bytes == 5 * PAGE
    assert pages(cache, subject, 3) == pages(cache, other, 3)


def test_prefixes_give_way_to_rows_the_last_of_the_oldest_first() -> None:
    cache = cache_of(8)
    for key in (POET, PIRATE):
        cache.release(admitted(cache, request(3 * BLOCK, key)))
    assert (cache.row_bytes, cache.prefixes.nbytes) == (0, 6 * PAGE)
    admitted(cache, request(4 * BLOCK, ()))
    assert cache.prefixes.nbytes == 4 * PAGE
    lengths = [len(cache.prefixes.find(request(3 * BLOCK + 1, key))) for key in (POET, PIRATE)]
    assert lengths == [1, 3]


def test_what_is_read_is_not_evicted() -> None:
    cache = cache_of(6)
    cache.release(admitted(cache, request(4 * BLOCK)))
    subject = request(2 * BLOCK + 1)
    assert cache.reserve(subject, subject.pending)
    assert subject.computed == 2 * BLOCK
    assert not cache.reserve(request(4 * BLOCK, PIRATE), 4 * BLOCK)
    assert cache.prefixes.nbytes == 2 * PAGE
    assert cache.reserve(request(3 * BLOCK, PIRATE), 3 * BLOCK)
    assert cache.prefixes.nbytes == 0


def test_a_prefix_does_not_give_way_to_the_request_that_starts_with_it() -> None:
    cache = cache_of(4)
    cache.release(admitted(cache, request(4 * BLOCK)))
    subject = Request([*request(2 * BLOCK).tokens, *[7] * 3 * BLOCK], key=POET)
    assert not cache.reserve(subject, subject.pending)
    assert (subject.computed, cache.prefixes.nbytes, cache.prefixes.queries) == (0, 4 * PAGE, 4 * BLOCK)
    del subject.tokens[4 * BLOCK :]
    assert cache.reserve(subject, subject.pending)
    assert (subject.computed, cache.prefixes.nbytes) == (2 * BLOCK, 0)


def test_the_last_token_is_computed() -> None:
    cache = cache_of(4)
    cache.release(admitted(cache, request(2 * BLOCK)))
    subject = request(2 * BLOCK)
    assert cache.reserve(subject, subject.pending)
    assert subject.computed == BLOCK


def test_what_a_request_computed_itself_was_not_cached_for_it() -> None:
    """It gave way in the middle of its prompt and comes again."""
    cache = cache_of(8)
    subject = request(3 * BLOCK)
    assert cache.reserve(subject, subject.pending)
    subject.admitted = 1.0
    compute(cache, subject, 2 * BLOCK + 5)
    cache.release(subject)
    subject.computed = 0
    assert cache.reserve(subject, subject.pending)
    assert (subject.computed, subject.cached) == (2 * BLOCK, 0)


def test_memory_falls_after_a_burst() -> None:
    cache = cache_of(8 * SLAB)
    burst = [request(BLOCK - 1, first=first) for first in range(8 * SLAB)]
    for subject in burst:
        admitted(cache, subject)
    assert cache.nbytes == 8 * SLAB * PAGE
    for subject in burst[1:]:
        cache.release(subject)
    assert cache.nbytes == SLAB * PAGE
    cache.release(burst[0])
    assert cache.nbytes == 0


@pytest.mark.parametrize("live", [False, True])
def test_clear_frees_all(live: bool) -> None:
    cache = cache_of(8)
    subject = admitted(cache, request(3 * BLOCK + 1))
    if not live:
        cache.release(subject)
    cache.clear()
    assert (cache.nbytes, cache.row_bytes, cache.prefixes.nbytes) == (0, 0, 0)
    cache.release(subject)  # it has no row any more
    again = request(3 * BLOCK + 1)
    assert cache.reserve(again, again.pending)
    assert again.computed == 0
