"""Drafts from a text's own n-grams, and how many of them are worth it."""

import random
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from loradeck.runner.speculation import (
    LONGEST,
    MEMORY_BOUND,
    SHORTEST,
    Acceptance,
    PromptLookup,
    draft_counts,
)


def definition(text: Sequence[int], count: int) -> list[int]:
    """The longest n-gram that occurred before, the last time that it did; what followed it, copied on and on."""
    for n in range(LONGEST, SHORTEST - 1, -1):
        for place in range(len(text) - 1, n - 1, -1):
            if text[place - n : place] == text[-n:]:
                whole = [*text]
                for i in range(count):
                    whole.append(whole[place + i])
                return whole[len(text) :]
    return []


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 12), st.integers(1, 5))
def test_drafts_are_those_of_the_definition_however_the_text_grows(text: list[int], count: int, by: int) -> None:
    lookup = PromptLookup()
    for stop in range(0, len(text) + 1, by):
        assert lookup.propose(text[:stop], count) == definition(text[:stop], count)


def test_a_long_text_is_read_once() -> None:
    reads = 0

    class Text(list):
        def __getitem__(self, place):
            nonlocal reads
            reads += 1
            return super().__getitem__(place)

    text, lookup = Text(random.Random(0).choices(range(50), k=3000)), PromptLookup()
    lookup.propose(text, 8)
    first, reads = reads, 0
    for token in range(100):
        text.append(token % 50)
        lookup.propose(text, 8)
    assert reads < first / 10


def acceptance(rate: float) -> Acceptance:
    record = Acceptance()
    record.rate = rate
    return record


def test_few_rows_have_many_drafts_and_many_rows_none() -> None:
    sure = [acceptance(1.0) for _ in range(MEMORY_BOUND)]
    assert draft_counts(sure[:1], [8], 1) == [8]
    assert draft_counts(sure[:4], [8] * 4, 4) == [3] * 4
    assert draft_counts(sure, [8] * MEMORY_BOUND, MEMORY_BOUND) == [0] * MEMORY_BOUND
    assert draft_counts(sure[:1], [8], 200) == [0]  # others read their prompts


def test_the_likeliest_drafts_come_first_and_what_does_not_pay_is_left() -> None:
    assert draft_counts([acceptance(0.5), acceptance(0.9)], [8, 8], 2) == [0, 6]
    assert draft_counts([acceptance(0.05)], [8], 1) == [0]
    assert draft_counts([acceptance(1.0)], [8], 6, max_tokens=7) == [1]


def test_rows_whose_drafts_are_wrong_stop_and_try_again_some_time() -> None:
    own, tried = Acceptance(), []
    for step in range(1000):
        (count,) = draft_counts([own], [8], 1)
        own.record(count, 0)
        if count:
            tried.append(step)
    assert len(tried) < 60
    assert tried[-1] > 900
    while own.rate < 0.95:
        own.record(1, 1)
    assert draft_counts([own], [8], 1)[0] > 6
