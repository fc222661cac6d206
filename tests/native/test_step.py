"""A step computes what its table defines, and a sequence's bits are its own: in all builds."""

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tests.native import oracle
from tests.native.tables import FLOATS, Blend, Sequence, Shape, adapter_of, compute, shapes, table_of

from loradeck.native.model import NativeModel
from loradeck.native.pages import DTYPES

THREADS = st.integers(1, 5)
RANKS = (1, 3, 8, 17, 64)


def tokens_of(length: int, vocabulary: int, seed: int) -> list[int]:
    return torch.randint(vocabulary, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def dtype_for(shape: Shape, halves: bool) -> Shape:
    """Return a model that a build can compute."""
    return Shape(**{**vars(shape), "dtype": torch.bfloat16}) if halves else shape


def close(logits: torch.Tensor, definition: torch.Tensor, tolerance: float) -> bool:
    """Whether they agree where the definition is clear, which it must be for some token."""
    assume(len(definition))
    return bool((logits[: len(definition)] - definition).abs().max() <= tolerance * definition.abs().max())


TOLERANCES = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}  # by the cache's dtype


@given(shape=shapes(), length=st.sampled_from((1, 7, 33, 70)), threads=THREADS)
@settings(max_examples=30)
def test_it_computes_what_the_table_says(halves, shape, length, threads) -> None:
    shape = dtype_for(shape, halves)
    table = table_of(shape)
    model = NativeModel(table, halves=halves)
    tokens = tokens_of(length, shape.vocabulary, shape.seed)
    (logits,) = compute([Sequence(model, tokens)], [[(0, length)]], threads)
    cache = DTYPES[model.c.cache_format]
    tolerance = 8e-2 if halves else TOLERANCES[cache]
    assert close(logits, oracle.logits(table, tokens, (), cache, halves), tolerance)


def blends_of(table, count: int, seed: int, broken: int | None = None) -> list[Blend]:
    """Return none, one or a blend of adapters for each of some sequences; the last ones share theirs."""
    adapters = [
        adapter_of(table, RANKS[(seed + i) % len(RANKS)], FLOATS[(seed + i) % 3], seed + i, missing=0.2)
        for i in range(4)
    ]
    choices: list[Blend] = [(), *(((adapter, 1.0),) for adapter in adapters)]
    choices += [((adapters[0], 0.5), (adapters[1], -0.7)), tuple((adapter, 0.3) for adapter in adapters)]
    return [choices[(seed + i // 2) % len(choices)] for i in range(count)]


@given(shape=shapes(), length=st.sampled_from((1, 5, 40)), number=st.integers(0, 13), threads=THREADS)
@settings(max_examples=30)
def test_adapters_compute_what_their_weights_add(halves, shape, length, number, threads) -> None:
    shape = dtype_for(shape, halves)
    table = table_of(shape)
    model = NativeModel(table, halves=halves)
    tokens = tokens_of(length, shape.vocabulary, shape.seed)
    blend = blends_of(table, 14, shape.seed)[number]
    (logits,) = compute([Sequence(model, tokens, blend)], [[(0, length)]], threads)
    cache = DTYPES[model.c.cache_format]
    tolerance = 8e-2 if halves else TOLERANCES[cache]
    assert close(logits, oracle.logits(table, tokens, blend, cache, halves), tolerance)


@given(data=st.data(), shape=shapes(layers=2))
@settings(max_examples=25)
def test_a_sequence_has_the_same_bits_in_any_batch(halves, data, shape) -> None:
    shape = dtype_for(shape, halves)
    table = table_of(shape)
    model = NativeModel(table, halves=halves)
    count = data.draw(st.sampled_from((1, 2, 3, 5, 16, 33, 64)), "sequences")
    lengths = data.draw(st.lists(st.integers(1, 50 if count < 16 else 12), min_size=count, max_size=count), "lengths")
    blends = blends_of(table, count, shape.seed)
    random = data.draw(st.randoms(use_true_random=False))
    tokens = [tokens_of(length, shape.vocabulary, shape.seed + i) for i, length in enumerate(lengths)]
    alone = [
        compute([Sequence(model, each, blend)], [[(0, len(each))]], 1)[0]
        for each, blend in zip(tokens, blends, strict=True)
    ]
    left = dict(enumerate(lengths))
    steps = []
    while left:
        taken = random.sample([*left], random.randint(1, len(left)))
        steps.append([(i, random.choice((1, left[i], random.randint(1, left[i])))) for i in taken])
        for i, number in steps[-1]:
            left[i] -= number
        left = {i: rest for i, rest in left.items() if rest}
    threads = data.draw(THREADS, "threads")
    sequences = [
        Sequence(model, each, blend, seed=i) for i, (each, blend) in enumerate(zip(tokens, blends, strict=True))
    ]
    together = compute(sequences, steps, threads)
    assert all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(together, alone, strict=True))
