import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loradeck.dataset.example import UNSUPERVISED, Example
from loradeck.train.batching import Batches, collate, pieces


def examples(count: int, longest: int = 50) -> list[Example]:
    return [Example([n] * (1 + n * 7919 % longest), [n] * (1 + n * 7919 % longest)) for n in range(count)]


def passes(count: int, size: int, seed: int, n: int = 1) -> list[list[int]]:
    batches = Batches(range(count), size, seed=seed)
    return [batches[step] for step in range(n * len(batches))]


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


def test_a_step_is_the_same_however_it_is_come_to() -> None:
    batches = Batches(range(50), 4, seed=3)
    forward = [batches[step] for step in range(40)]
    assert [batches[step] for step in reversed(range(40))] == forward[::-1]
    code = "from loradeck.train.batching import Batches; print(Batches(range(50), 4, seed=3)[31])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == str(forward[31])


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=20), tokens=st.integers(1, 60))
def test_pieces_are_the_units_in_their_order_within_the_bound(lengths: list[int], tokens: int) -> None:
    units = [(Example([1] * n, [1] * n), Example([1], [1])) for n in lengths]
    cut = [*pieces(units, tokens)]
    assert [unit for piece in cut for unit in piece] == units
    sizes = [sum(len(document.tokens) for unit in piece for document in unit) for piece in cut]
    assert all(size <= tokens or len(piece) == 1 for size, piece in zip(sizes, cut, strict=True))
    firsts = [sum(len(document.tokens) for document in piece[0]) for piece in cut[1:]]
    assert all(size + first > tokens for size, first in zip(sizes, firsts, strict=False)), "none is cut too early"


def test_a_packed_batch_lies_end_to_end() -> None:
    batch = collate([Example([5, 6, 7], [UNSUPERVISED, 6, 7]), Example([8, 9], [8, 9])], packed=True)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9]]
    assert batch.labels.tolist() == [[UNSUPERVISED, 6, 7, UNSUPERVISED, 9]], "no document predicts the next one's first"
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert (batch.lengths, batch.learned, batch.attention_mask) == ((3, 2), (2, 1), None)


def test_a_padded_batch_has_a_row_each() -> None:
    batch = collate([Example([5, 6, 7], [UNSUPERVISED, 6, 7]), Example([8, 9], [8, 9])], packed=False)
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch.labels.tolist() == [[UNSUPERVISED, 6, 7], [UNSUPERVISED, 9, UNSUPERVISED]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert (batch.lengths, batch.learned, batch.position_ids) == ((3, 2), (2, 1), None)


@pytest.mark.parametrize("packed", [True, False])
def test_many_lengths(packed: bool) -> None:
    batch = collate(examples(20), packed=packed)
    assert batch.input_ids.shape == batch.labels.shape
    assert sum(batch.lengths) == sum(len(example.tokens) for example in examples(20))
