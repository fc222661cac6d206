"""Blocks are found by their adapters, what came before them, and their own tokens; held ones stay."""

from loradeck.runner.prefix_cache import BLOCK, Block, PrefixCache
from loradeck.runner.request import Request
from loradeck.sampling import SamplingParams

BASE, POET, HALF = (), (("poet", 1.0),), (("poet", 0.5),)
SIZE = 100  # bytes of a block here


def request(key, length: int, first: int = 0, **sampling) -> Request:
    return Request([first, *range(1, length)], SamplingParams(**sampling), key)


def keep(prefixes: PrefixCache[str], subject: Request, label: str = "") -> list[Block[str]]:
    """Keep all that a request computes, and hold it."""
    blocks: list[Block[str]] = []
    prefixes.keep(subject, len(subject.tokens), blocks, lambda index: f"{label}{index}")
    return blocks


def payloads(prefixes: PrefixCache[str], subject: Request) -> list[str]:
    return [block.payload for block in prefixes.find(subject)]


def test_whole_blocks_are_found_but_for_the_last_token() -> None:
    prefixes = PrefixCache[str](SIZE)
    keep(prefixes, request(POET, 3 * BLOCK + 5))
    assert payloads(prefixes, request(POET, 3 * BLOCK + 5)) == ["0", "1", "2"]
    assert payloads(prefixes, request(POET, 3 * BLOCK + 1)) == ["0", "1", "2"]
    assert payloads(prefixes, request(POET, 3 * BLOCK)) == ["0", "1"]  # its last token is to be computed
    assert payloads(prefixes, request(POET, BLOCK)) == []


def test_a_request_starts_with_what_was_found() -> None:
    prefixes = PrefixCache[str](SIZE)
    keep(prefixes, request(POET, 3 * BLOCK))
    subject, again, scored = (request(POET, 3 * BLOCK, **sampling) for sampling in ({}, {}, {"prompt_logprobs": 0}))
    again.admitted = 1.0  # what it finds may be its own
    for each in (subject, again, scored):
        prefixes.start(each, prefixes.find(each))
    assert [each.computed for each in (subject, again, scored)] == [2 * BLOCK, 2 * BLOCK, 0]
    assert [each.cached for each in (subject, again, scored)] == [2 * BLOCK, 0, 0]
    assert (prefixes.queries, prefixes.hits) == (6 * BLOCK, 4 * BLOCK)


def test_nothing_is_found_under_another_key() -> None:
    prefixes = PrefixCache[str](SIZE)
    for label, key in (("poet", POET), ("half", HALF), ("base", BASE)):
        keep(prefixes, request(key, BLOCK), label)
    for label, key in (("poet", POET), ("half", HALF), ("base", BASE)):
        assert payloads(prefixes, request(key, BLOCK + 1)) == [f"{label}0"]
    assert payloads(prefixes, request((("pirate", 1.0),), BLOCK + 1)) == []
    assert payloads(prefixes, request((*POET, ("pirate", 1.0)), BLOCK + 1)) == []


def test_the_same_tokens_after_others_are_others() -> None:
    prefixes = PrefixCache[str](SIZE)
    keep(prefixes, request(POET, 2 * BLOCK, first=0), "a")
    keep(prefixes, request(POET, 2 * BLOCK, first=999), "b")
    assert payloads(prefixes, request(POET, 2 * BLOCK + 1, first=999)) == ["b0", "b1"]
    assert payloads(prefixes, request(POET, 2 * BLOCK + 1, first=5)) == []


def test_what_is_known_is_not_made_again() -> None:
    prefixes = PrefixCache[str](SIZE)
    first = keep(prefixes, request(POET, 4 * BLOCK), "a")
    second = keep(prefixes, request(POET, 5 * BLOCK), "b")
    assert [block.payload for block in second] == ["a0", "a1", "a2", "a3", "b4"]
    assert second[:4] == first


def test_the_least_recently_used_give_way_the_last_of_a_prompt_first() -> None:
    prefixes = PrefixCache[str](SIZE)
    poet, base, half = request(POET, 2 * BLOCK + 1), request(BASE, 2 * BLOCK + 1), request(HALF, BLOCK + 1)
    for subject, label in ((poet, "poet"), (base, "base")):
        prefixes.release(keep(prefixes, subject, label))
    blocks = prefixes.find(poet)
    prefixes.start(poet, blocks)
    prefixes.release(blocks)
    prefixes.release(keep(prefixes, half, "half"))
    assert prefixes.nbytes == 5 * SIZE
    assert prefixes.shrink(4 * SIZE) == ["base1"]
    assert [payloads(prefixes, subject) for subject in (poet, base, half)] == [["poet0", "poet1"], ["base0"], ["half0"]]
    assert prefixes.shrink(0) == ["base0", "poet1", "poet0", "half0"]
    assert (prefixes.nbytes, len(prefixes._blocks)) == (0, 0)


def test_what_is_held_stays_until_the_last_one_releases_it() -> None:
    prefixes = PrefixCache[str](SIZE)
    long, short = request(POET, 3 * BLOCK), request(POET, BLOCK + 1)
    first, second = keep(prefixes, long), keep(prefixes, short)
    assert prefixes.nbytes == 0
    prefixes.release(first)
    assert prefixes.nbytes == 2 * SIZE
    assert prefixes.shrink(0) == ["2", "1"]
    assert payloads(prefixes, long) == ["0"]
    prefixes.release(second)
    assert prefixes.shrink(0) == ["0"]
