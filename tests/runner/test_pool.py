"""Rows of keys and values: without gaps, and zeros where nobody has written."""

import random

import pytest
import torch

from loradeck.runner.kv_cache import KVLayout, LayerShape, Pool

SMALL, WIDE = LayerShape(heads=1, key_width=4, value_width=4), LayerShape(heads=2, key_width=3, value_width=5)
LAYOUT = KVLayout((SMALL, WIDE, SMALL), torch.float32, torch.device("cpu"))
CAPACITY = 8


@pytest.fixture
def pool() -> Pool[str]:
    return Pool(LAYOUT, CAPACITY)


def write(pool: Pool[str], row: int, label: float, length: int = CAPACITY) -> None:
    pool.write(row, 0, [part[:, :, :length].clone().fill_(label) for part in pool.read(row, 0, CAPACITY)])


def add(pool: Pool[str], owner: str) -> int:
    return pool.add(owner, pool.rows_with_one_more(100))


def labels(pool: Pool[str]) -> list[float]:
    """What each row says in its first token, in every layer."""
    found = []
    for row in range(len(pool.owners)):
        values = {float(part[layer, head, 0, 0]) for part in pool.read(row, 0, 1) for layer in range(part.shape[0]) for head in range(part.shape[1])}  # fmt: skip
        assert len(values) == 1
        found.append(values.pop())
    return found


def test_layers_of_several_shapes(pool: Pool[str]) -> None:
    assert LAYOUT.shapes == (SMALL, WIDE)
    assert LAYOUT.indices == ((0, 0), (1, 0), (0, 1))
    assert LAYOUT.token_bytes == 4 * (8 + 16 + 8)
    add(pool, "a")
    for layer, own in enumerate(LAYOUT.layers):
        keys, values = pool.layer(layer)
        assert keys.shape == (1, own.heads, CAPACITY, own.key_width)
        assert values.shape == (1, own.heads, CAPACITY, own.value_width)
        keys.fill_(layer + 1.0)
    assert [float(pool.layer(layer)[0].mean()) for layer in range(3)] == [1.0, 2.0, 3.0]
    assert sum(part.nbytes for part in pool.read(0, 0, CAPACITY)) == pool.row_bytes


def test_rows_close_the_gap_that_one_leaves(pool: Pool[str]) -> None:
    for i, owner in enumerate("abcd"):
        write(pool, add(pool, owner), i + 1.0)
    pool.remove(1, CAPACITY)
    assert (pool.owners, labels(pool)) == (["a", "d", "c"], [1.0, 4.0, 3.0])
    pool.remove(2, CAPACITY)
    assert (pool.owners, labels(pool)) == (["a", "d"], [1.0, 4.0])


def test_what_a_row_leaves_behind_is_zeros(pool: Pool[str]) -> None:
    """0 · NaN is NaN: attention gives no weight to what lies beyond a row's tokens, and that is not enough."""
    write(pool, add(pool, "nan"), float("nan"))
    write(pool, add(pool, "short"), 1.0, length=3)
    write(pool, add(pool, "nan too"), float("nan"))
    pool.remove(2, CAPACITY)
    pool.remove(0, 3)
    assert pool.owners == ["short"]
    for part in pool.read(0, 0, CAPACITY):
        assert not part.isnan().any()
        assert not part[:, :, 3:].any()
    add(pool, "next")
    assert not any(part.any() for part in pool.read(1, 0, CAPACITY))


def test_memory_follows_the_owners(pool: Pool[str]) -> None:
    most = 0
    for i in range(20):
        add(pool, str(i))
        assert len(pool.owners) <= pool.rows <= 1.5 * len(pool.owners) + 1
        most = max(most, pool.rows)
    while pool.owners:
        pool.remove(0, CAPACITY)
    assert pool.rows == 0
    assert pool.layer(0)[0].untyped_storage().nbytes() == 0


def test_no_more_rows_than_there_is_room_for(pool: Pool[str]) -> None:
    for i in range(4):
        add(pool, str(i))
    assert pool.rows == 4
    assert [pool.rows_with_one_more(more) for more in (0, 1, 2, 9)] == [4, 5, 6, 6]


@pytest.mark.parametrize("seed", range(3))
def test_whatever_comes_and_goes_each_row_keeps_its_own(pool: Pool[str], seed: int) -> None:
    chance = random.Random(seed)
    known: dict[str, tuple[float, int]] = {}
    for number in range(200):
        if not pool.owners or chance.random() < 0.55:
            row, length = add(pool, str(number)), chance.randrange(1, CAPACITY + 1)
            write(pool, row, number + 1.0, length)
            known[str(number)] = number + 1.0, length
        else:
            row = chance.randrange(len(pool.owners))
            known.pop(pool.owners[row])
            pool.remove(row, known[pool.owners[-1]][1] if row < len(pool.owners) - 1 else 0)
        assert {*pool.owners} == {*known}
    for row, owner in enumerate(pool.owners):
        label, length = known[owner]
        for part in pool.read(row, 0, CAPACITY):
            assert (part[:, :, :length] == label).all()
            assert not part[:, :, length:].any()
