import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loradeck.dataset.example import Example, Preference
from loradeck.dataset.held_out import held_out
from loradeck.dataset.token_file import StoredExamples, TokenFile
from loradeck.errors import ConfigError, DataError


def stored(examples: Sequence[Example | Preference]) -> StoredExamples:
    file = TokenFile()
    for example in examples:
        file.append(example)
    return file.examples(range(len(file)))


def some(count: int) -> list[Example]:
    return [Example([at, at + 1], [-100, at + 1]) for at in range(count)]


def split(examples: Sequence[Example | Preference], ratio: float, seed: int) -> tuple[list, list]:
    train, valid = held_out(stored(examples), ratio, seed)
    return list(train), list(valid)


def by_definition(examples: list[Example], ratio: float, seed: int) -> tuple[list, list]:
    """The same split, with all examples in memory."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, example in enumerate(examples):
        groups.setdefault((*example.tokens, *example.labels), []).append(index)
    limit = min(max(1, round(ratio * len(examples))), len(examples) - 1)
    shuffled = sorted(groups.values())
    random.Random(f"held out {seed}").shuffle(shuffled)
    held: set[int] = set()
    for group in shuffled:
        if len(held) + len(group) <= limit:
            held.update(group)
    held = held or set(min(shuffled, key=len))
    return [e for i, e in enumerate(examples) if i not in held], [e for i, e in enumerate(examples) if i in held]


def test_the_seed_decides_which_examples_are_held_out() -> None:
    examples = some(100)
    train, valid = split(examples, 0.1, 0)
    assert len(valid) == 10
    assert sorted(train + valid, key=lambda example: example.tokens) == examples
    assert train == [example for example in examples if example in train]
    assert split(examples, 0.1, 0) == (train, valid)
    assert split(examples, 0.1, 1) != (train, valid)
    pairs = [Preference(example, examples[0]) for example in examples]
    assert len(split(pairs, 0.1, 0)[1]) == 10


@given(
    st.lists(st.integers(0, 5), min_size=2, max_size=30).filter(lambda ids: len(set(ids)) > 1),
    st.floats(0.001, 0.999),
    st.integers(0, 5),
)
def test_both_sides_have_examples_and_share_none(ids: list[int], ratio: float, seed: int) -> None:
    examples = [Example([0, at], [-100, at]) for at in ids]
    train, valid = split(examples, ratio, seed)
    assert train
    assert valid
    assert len(train) + len(valid) == len(ids)
    assert not [example for example in train if example in valid]
    assert (train, valid) == by_definition(examples, ratio, seed)


def test_pairs_are_equal_only_if_both_answers_are() -> None:
    one, two, three = some(3)
    pairs = [Preference(one, two), Preference(one, three), Preference(one, two)]
    train, valid = split(pairs, 0.4, 0)
    assert sorted([train, valid], key=len) == [[pairs[1]], [pairs[0], pairs[2]]]
    # The same tokens, divided differently between the two answers.
    long, short = Example([1, 2, 3], [-100, 2, 3]), Example([1, 2], [-100, 2])
    rest = Example([3, 1, 2], [3, -100, 2])
    assert len(split([Preference(long, short), Preference(short, rest)], 0.5, 0)[1]) == 1


def test_a_split_of_a_part() -> None:
    part = stored(some(40))[10:30]
    train, valid = held_out(part, 0.25, 0)
    assert sorted([*train, *valid], key=lambda example: example.tokens) == some(40)[10:30]
    again, other = held_out(train, 0.2, 0)
    assert sorted([*again, *other], key=lambda example: example.tokens) == list(train)


def test_what_cannot_be_held_out() -> None:
    with pytest.raises(DataError, match="all examples are equal"):
        split(some(1) * 5, 0.5, 0)
    for ratio in (0, 1, -0.5, float("nan")):
        with pytest.raises(ConfigError, match="the ratio to hold out must be between 0 and 1"):
            split(some(5), ratio, 0)
