"""Rows and prefixes within a budget of bytes: growing, moving, giving way."""

import random

import pytest
import torch

from loradeck.runner.kv_cache import MIN_CAPACITY, KVCache, KVLayout, LayerShape
from loradeck.runner.prefix_cache import BLOCK
from loradeck.runner.request import Request
from loradeck.sampling import SamplingParams

LAYOUT = KVLayout((LayerShape(1, 2, 2), LayerShape(2, 2, 2)), torch.float32, torch.device("cpu"))
ROW = LAYOUT.token_bytes * MIN_CAPACITY
POET = (("poet", 1.0),)


def request(prompt: int, key=POET, first: int = 0, **sampling) -> Request:
    return Request([first, *range(1, prompt)], SamplingParams(**sampling), key)


def compute(cache: KVCache, own: Request, count: int | None = None) -> None:
    """Write what tells the tokens: their ids."""
    pool, row = cache.row(own)
    stop = own.computed + (own.pending if count is None else count)
    ids = torch.tensor(own.tokens[own.computed : stop], dtype=torch.float32)[None, None, :, None]
    pool.write(row, own.computed, [ids.expand_as(part) for part in pool.read(row, own.computed, stop)])
    own.computed = stop


def check(cache: KVCache, *requests: Request) -> None:
    """Each row holds its own tokens, and nothing beyond them; the budget is kept."""
    assert cache.nbytes <= cache.budget
    for own in requests:
        pool, row = cache.row(own)
        assert pool.owners[row] is own
        ids = torch.tensor(own.tokens[: own.computed], dtype=torch.float32)[None, None, :, None]
        for part in pool.read(row, 0, pool.capacity):
            assert torch.equal(part[:, :, : own.computed], ids.expand_as(part[:, :, : own.computed]))
            assert not part[:, :, own.computed :].any()


def test_the_longest_row() -> None:
    assert [KVCache(LAYOUT, budget).max_tokens for budget in (ROW - 1, ROW, 2 * ROW - 1, 2 * ROW, 9 * ROW)] == [
        0, MIN_CAPACITY, MIN_CAPACITY, 2 * MIN_CAPACITY, 8 * MIN_CAPACITY,
    ]  # fmt: skip


def test_a_row_moves_when_it_outgrows_its_place() -> None:
    cache = KVCache(LAYOUT, 100 * ROW)
    own, other = request(MIN_CAPACITY - 1), request(20, first=7)
    for each in (own, other):
        assert cache.reserve(each, each.pending)
        compute(cache, each)
    assert cache.row(own)[0] is cache.row(other)[0]
    for token in range(2 * MIN_CAPACITY):
        own.tokens.append(token)
        assert cache.reserve(own, own.computed + 1)
        compute(cache, own)
    assert cache.row(own)[0].capacity == 4 * MIN_CAPACITY
    check(cache, own, other)
    cache.release(own)
    cache.release(other)
    assert cache.row_bytes == 0


def test_without_room_nothing_changes() -> None:
    cache = KVCache(LAYOUT, 2 * ROW)
    own, other, third = request(20), request(MIN_CAPACITY, first=7), request(30, first=8)
    for each in (own, other):
        assert cache.reserve(each, each.pending)
        compute(cache, each)
    before = cache.row_bytes
    assert not cache.reserve(third, 30)
    assert not cache.reserve(other, MIN_CAPACITY + 1)
    assert cache.row_bytes == before
    check(cache, own, other)
    cache.release(own)
    assert cache.reserve(third, 30)


def test_the_only_row_may_grow_to_the_whole_budget() -> None:
    cache = KVCache(LAYOUT, 4 * ROW)
    first = [request(20, first=i) for i in range(3)]
    for own in first:
        assert cache.reserve(own, 20)
        compute(cache, own)
    own = first.pop()
    for other in first:
        cache.release(other)
    own.tokens += range(4 * MIN_CAPACITY - 20)
    assert cache.reserve(own, 4 * MIN_CAPACITY)
    compute(cache, own)
    check(cache, own)


def test_all_of_the_budget_can_be_used() -> None:
    """Pools grow by halves, and that may be more than there is room for."""
    cache = KVCache(LAYOUT, 10 * ROW)
    rows = [request(20, first=i) for i in range(11)]
    assert [cache.reserve(own, 20) for own in rows] == [True] * 10 + [False]


def test_prefixes_have_what_rows_leave() -> None:
    cache = KVCache(LAYOUT, 2 * ROW)
    own = request(3 * BLOCK)
    assert cache.reserve(own, own.pending)
    compute(cache, own)
    cache.keep(own)
    assert cache.prefixes.nbytes == 3 * BLOCK * LAYOUT.token_bytes
    cache.release(own)
    others = [request(20, first=i) for i in (7, 8)]
    for other in others:
        assert cache.reserve(other, 20)
    assert cache.prefixes.nbytes == 0
    check(cache)


def test_prefixes_are_copies() -> None:
    cache = KVCache(LAYOUT, 100 * ROW)
    own, again = request(2 * BLOCK), request(2 * BLOCK)
    cache.reserve(own, own.pending)
    compute(cache, own)
    cache.keep(own)
    pool, row = cache.row(own)
    for part in pool.read(row, 0, pool.capacity):
        part.fill_(float("nan"))
    cache.reserve(again, again.pending)
    check(cache, again)


def test_a_prompt_longer_than_the_room_keeps_its_beginning() -> None:
    """Pools leave room for one block and a half."""
    cache = KVCache(LAYOUT, ROW + 3 * BLOCK * LAYOUT.token_bytes // 2)
    own = request(MIN_CAPACITY)
    cache.reserve(own, own.pending)
    compute(cache, own)
    cache.keep(own)
    assert cache.prefixes.nbytes == BLOCK * LAYOUT.token_bytes
    check(cache, own)
    assert [len(block.payload) for block in cache.prefixes.find(own)] == [4]


def test_a_row_begins_with_what_is_known_of_its_prompt() -> None:
    cache = KVCache(LAYOUT, 100 * ROW)
    own = request(4 * BLOCK)
    cache.reserve(own, own.pending)
    compute(cache, own)
    cache.release(own)
    again, other, scored = request(4 * BLOCK), request(4 * BLOCK, key=()), request(4 * BLOCK, prompt_logprobs=0)
    for each in (again, other, scored):
        cache.reserve(each, each.pending)
    assert [each.computed for each in (again, other, scored)] == [3 * BLOCK, 0, 0]
    assert [each.cached for each in (again, other, scored)] == [3 * BLOCK, 0, 0]
    check(cache, again)


def test_what_a_request_computed_itself_was_not_cached_for_it() -> None:
    """It gave way in the middle of its prompt and comes again."""
    cache = KVCache(LAYOUT, 100 * ROW)
    own = request(3 * BLOCK)
    cache.reserve(own, own.pending)
    own.admitted = 1.0
    compute(cache, own, 2 * BLOCK)
    cache.release(own)
    own.computed = 0
    cache.reserve(own, own.pending)
    assert (own.computed, own.cached) == (2 * BLOCK, 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_whatever_comes_and_goes_the_budget_is_kept(seed: int) -> None:
    chance = random.Random(seed)
    cache = KVCache(LAYOUT, 12 * ROW)
    live: list[Request] = []
    refused = 0
    for number in range(150):
        if chance.random() < 0.4:
            own = request(chance.randrange(1, 3 * MIN_CAPACITY), first=number % 5)
            if cache.reserve(own, own.pending):
                compute(cache, own)
                live.append(own)
            else:
                refused += 1
        elif live and chance.random() < 0.3:
            cache.release(live.pop(chance.randrange(len(live))))
        elif live:
            own = chance.choice(live)
            if cache.reserve(own, own.computed + 40):
                own.tokens += [number] * 40
                compute(cache, own)
        check(cache, *live)
    assert refused
    assert cache.prefixes.hits
    for own in live:
        cache.release(own)
    assert (cache.row_bytes, cache._rows, cache._pools) == (0, {}, {})
