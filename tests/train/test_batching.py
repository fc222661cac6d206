import pytest
from hypothesis import given
from hypothesis import strategies as st

from loradeck.dataset.example import UNSUPERVISED, Example
from loradeck.train.batching import BatchSampler, collate, split_units


def examples(count: int, longest: int = 50) -> list[Example]:
    return [Example([n] * (1 + n * 7919 % longest), [n] * (1 + n * 7919 % longest)) for n in range(count)]


def epochs(count: int, size: int, seed: int, n: int = 1) -> list[list[int]]:
    sampler = BatchSampler(range(count), size, seed=seed)
    return [sampler[step] for step in range(n * len(sampler))]


@given(count=st.integers(1, 200), size=st.integers(1, 9), seed=st.integers(0, 9))
def test_an_epoch_has_every_example_once(count: int, size: int, seed: int) -> None:
    groups = epochs(count, size, seed)
    assert sorted(n for group in groups for n in group) == list(range(count))
    assert all(1 <= len(group) <= size for group in groups)


def test_the_order_follows_the_seed_and_differs_between_epochs() -> None:
    assert epochs(100, 4, seed=1, n=3) == epochs(100, 4, seed=1, n=3)
    assert epochs(100, 4, seed=1) != epochs(100, 4, seed=2)
    twice = epochs(100, 4, seed=1, n=2)
    assert twice[:25] != twice[25:]


def test_a_step_does_not_depend_on_the_steps_before_it_or_on_the_process() -> None:
    sampler = BatchSampler(range(50), 4, seed=3)
    forward = [sampler[step] for step in range(40)]
    assert [sampler[step] for step in reversed(range(40))] == forward[::-1]
    assert forward[31] == [4, 28, 10, 12], "as in any other process"


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=20), limit=st.integers(1, 60))
def test_groups_are_the_units_in_order_within_the_limit(lengths: list[int], limit: int) -> None:
    units = [(Example([1] * n, [1] * n), Example([1], [1])) for n in lengths]
    groups = [*split_units(units, limit)]
    assert [unit for group in groups for unit in group] == units
    sizes = [sum(len(example.tokens) for unit in group for example in unit) for group in groups]
    assert all(size <= limit or len(group) == 1 for size, group in zip(sizes, groups, strict=True))
    firsts = [sum(len(example.tokens) for example in group[0]) for group in groups[1:]]
    assert all(size + first > limit for size, first in zip(sizes, firsts, strict=False)), "none is split too early"


def test_a_packed_batch_lies_end_to_end() -> None:
    batch = collate([Example([5, 6, 7], [UNSUPERVISED, 6, 7]), Example([8, 9], [8, 9])], packed=True)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9]]
    assert batch.labels.tolist() == [[UNSUPERVISED, 6, 7, UNSUPERVISED, 9]], (
        "no example predicts the first token of the next"
    )
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert (batch.lengths, batch.supervised, batch.attention_mask) == ((3, 2), (2, 1), None)


def test_a_padded_batch_has_a_row_each() -> None:
    batch = collate([Example([5, 6, 7], [UNSUPERVISED, 6, 7]), Example([8, 9], [8, 9])], packed=False)
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch.labels.tolist() == [[UNSUPERVISED, 6, 7], [UNSUPERVISED, 9, UNSUPERVISED]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert (batch.lengths, batch.supervised, batch.position_ids) == ((3, 2), (2, 1), None)


@pytest.mark.parametrize("packed", [True, False])
def test_examples_of_many_lengths(packed: bool) -> None:
    batch = collate(examples(20), packed=packed)
    assert batch.input_ids.shape == batch.labels.shape
    assert sum(batch.lengths) == sum(len(example.tokens) for example in examples(20))
