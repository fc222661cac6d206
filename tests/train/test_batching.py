from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loradeck.train.batching import WINDOW, batches, collate
from loradeck.train.example import UNSUPERVISED, Example


def examples(count: int, longest: int = 50) -> list[Example]:
    return [Example([n] * (1 + n * 7919 % longest), [n] * (1 + n * 7919 % longest)) for n in range(count)]


def passes(count: int, size: int, seed: int, n: int = 1) -> list[list[int]]:
    groups = islice(batches(examples(count), size, seed=seed), n * -(-count // size))
    return [[example.tokens[0] for example in group] for group in groups]


@given(count=st.integers(1, 200), size=st.integers(1, 9), seed=st.integers(0, 9))
def test_a_pass_has_every_example_once(count: int, size: int, seed: int) -> None:
    groups = passes(count, size, seed)
    assert sorted(n for group in groups for n in group) == list(range(count))
    assert all(1 <= len(group) <= size for group in groups)


def test_the_order_follows_the_seed_and_differs_from_pass_to_pass() -> None:
    assert passes(100, 4, seed=1, n=3) == passes(100, 4, seed=1, n=3)
    assert passes(100, 4, seed=1) != passes(100, 4, seed=2)
    twice = passes(100, 4, seed=1, n=2)
    assert twice[:25] != twice[25:]


def test_the_order_is_the_same_in_every_process() -> None:
    assert passes(5, 2, seed=0) == [[0, 3], [2], [1, 4]]


def test_a_batch_has_sequences_of_like_length() -> None:
    many = examples(4 * WINDOW * 5)
    groups = islice(batches(many, 4, seed=0), WINDOW * 5)
    waste = sum(max(len(e.tokens) for e in group) * len(group) - sum(len(e.tokens) for e in group) for group in groups)
    assert waste < 0.06 * sum(len(example.tokens) for example in many)


def test_padding_is_on_the_right_and_never_learned() -> None:
    batch = collate([Example([5, 6, 7], [UNSUPERVISED, 6, 7]), Example([8], [8])])
    assert batch.input_ids[0].tolist() == [5, 6, 7]
    assert batch.input_ids[1, 0] == 8
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.labels.tolist() == [[UNSUPERVISED, 6, 7], [8, UNSUPERVISED, UNSUPERVISED]]
    assert batch.tokens == 4


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_a_batch_larger_than_the_dataset_is_the_dataset(seed: int) -> None:
    assert sorted(passes(3, 100, seed)[0]) == [0, 1, 2]
