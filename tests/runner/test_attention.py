"""Attention over rows of a pool, by the book: each token sees the tokens of its row before it, and itself."""

from itertools import product

import pytest
import torch
from torch import Tensor

from loradeck.runner.attention import AttentionParams, Decode, PromptChunk
from loradeck.runner.kv_cache import KVLayout, LayerShape, Pool

HEADS, CAPACITY, WIDTH = 2, 16, 4
LAYOUT = KVLayout((LayerShape(HEADS, WIDTH, WIDTH),) * 2, torch.float32, torch.device("cpu"))
PARAMS = [
    AttentionParams(None, None, None),
    AttentionParams(0.7, None, None),
    AttentionParams(None, 5, None),
    AttentionParams(0.3, None, 2.0),
    AttentionParams(None, 3, 1.5),
]


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape)


def by_the_book(query: Tensor, keys: Tensor, values: Tensor, position: int, params: AttentionParams) -> Tensor:
    """One token's query (Q, D) over keys and values (H, T, D) of its row -> (Q, D)."""
    out = []
    for head, own in enumerate(query.double()):
        group = head * keys.shape[0] // query.shape[0]
        scores = keys[group].double() @ own * (WIDTH**-0.5 if params.scale is None else params.scale)
        if params.softcap is not None:
            scores = (scores / params.softcap).tanh() * params.softcap
        seen = [p for p in range(position + 1) if params.window is None or position - p < params.window]
        out.append(scores[seen].softmax(-1) @ values[group, seen].double())
    return torch.stack(out).float()


@pytest.fixture
def pool() -> Pool[str]:
    """Three rows that hold something, and NaN in a fourth that is nobody's business."""
    torch.manual_seed(0)
    made: Pool[str] = Pool(LAYOUT, CAPACITY)
    for owner in "abcd":
        row = made.add(owner, 4)
        made.write(row, 0, [torch.randn_like(part[:, :, :9]) for part in made.read(row, 0, CAPACITY)])
    for part in made.read(3, 0, CAPACITY):
        part.fill_(float("nan"))
    return made


@pytest.mark.parametrize(("params", "heads", "rows"), [*product(PARAMS, (2, 4), ([0, 1, 2], [0, 2], [1]))])
def test_single_tokens_of_several_rows(pool: Pool[str], params: AttentionParams, heads: int, rows: list[int]) -> None:
    positions = [4 + 2 * row for row in rows]
    query, key, value = drawn(1, heads, len(rows), WIDTH), *drawn(2, 1, HEADS, len(rows), WIDTH)
    own = Decode(pool, 0, rows, positions)
    for layer in range(2):
        seen = own.attend(layer, query, key, value, params)
        keys, values = pool.layer(layer)
        for i, (row, position) in enumerate(zip(rows, positions, strict=True)):
            assert torch.equal(keys[row, :, position], key[0, :, i])
            assert torch.equal(values[row, :, position], value[0, :, i])
            expected = by_the_book(query[0, :, i], keys[row], values[row], position, params)
            torch.testing.assert_close(seen[i], expected)


@pytest.mark.slow
@pytest.mark.parametrize(("params", "heads", "computed"), [*product(PARAMS, (2, 4), (0, 1, 6))])
def test_a_chunk_of_one_row(pool: Pool[str], params: AttentionParams, heads: int, computed: int) -> None:
    length = 7
    query, key, value = drawn(1, heads, length, WIDTH), *drawn(2, 1, HEADS, length, WIDTH)
    own = PromptChunk(pool, 0, 1, computed, length)
    for layer in range(2):
        seen = own.attend(layer, query, key, value, params)
        keys, values = pool.layer(layer)
        assert torch.equal(keys[1, :, computed : computed + length], key[0])
        for i in range(length):
            expected = by_the_book(query[0, :, i], keys[1], values[1], computed + i, params)
            torch.testing.assert_close(seen[i], expected)
