"""A step computes what its table defines, and a sequence's bits are its own: in all builds."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loradeck.native.model import NativeModel
from loradeck.native.pages import DTYPES
from tests.native import oracle
from tests.native.tables import FLOATS, Blend, Sequence, Shape, adapter_of, compute, shapes, table_of

THREADS = st.integers(1, 5)
RANKS = (1, 3, 8, 17, 64)


def tokens_of(length: int, vocabulary: int, seed: int) -> list[int]:
    return torch.randint(vocabulary, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def dtype_for(shape: Shape, halves: bool) -> Shape:
    """Return a model that a build can compute."""
    if not halves or shape.dtype == torch.int8:
        return shape
    return Shape(**{**vars(shape), "dtype": torch.bfloat16})


def close(logits: torch.Tensor, definition: torch.Tensor, tolerance: float) -> bool:
    return bool((logits.double() - definition).abs().max() <= tolerance * definition.abs().max())


TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # by the cache's dtype


@given(shape=shapes(), length=st.sampled_from((1, 7, 33, 70)), threads=THREADS)
@settings(max_examples=30)
def test_it_computes_what_the_table_says(halves, shape, length, threads) -> None:
    shape = dtype_for(shape, halves)
    table = table_of(shape)
    model = NativeModel(table, halves=halves)
    tokens = tokens_of(length, shape.vocabulary, shape.seed)
    logits, = compute([Sequence(model, tokens)], [[(0, length)]], threads)
    cache = DTYPES[model.c.cache_format]
    tolerance = 3e-2 if halves else TOLERANCES[cache]
    assert close(logits, oracle.logits(table, tokens, (), cache, halves), tolerance)
