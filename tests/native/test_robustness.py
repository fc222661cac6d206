"""What is broken stays where it is: numbers, threads, processes and memory."""

import os
import resource
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.native.tables import FLOATS, Sequence, Shape, adapter_of, compute, table_of
from tests.native.test_step import tokens_of

from loradeck.native.model import NativeModel
from loradeck.native.step import run
from loradeck.native.table import Table

EXPERTS = [(0,), (5,)]
SHAPE = Shape(hidden=64, head_dim=32, intermediate=96, vocabulary=100)


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def table_for(halves: bool, **different: object) -> Table:
    return table_of(Shape(**{**vars(SHAPE), "dtype": torch.bfloat16 if halves else torch.float32, **different}))


def model_of(halves: bool, **different: object) -> NativeModel:
    return NativeModel(table_for(halves, **different), halves=halves)


def whole(model: NativeModel, tokens: list[int], *blend, threads: int = 1) -> torch.Tensor:
    return compute([Sequence(model, tokens, blend)], [[(0, len(tokens))]], threads)[0]


@pytest.mark.parametrize("token", [-1, 100, 1 << 40])
def test_a_token_that_the_model_does_not_have_is_an_error(halves, token) -> None:
    with pytest.raises(IndexError, match=f"the model has no token {token}, only 100"):
        whole(model_of(halves), [1, token, 2])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("experts", EXPERTS)
def test_a_broken_adapter_changes_no_bit_of_others(halves, dtype, number, experts) -> None:
    table = table_for(halves, experts=experts)
    model = NativeModel(table, halves=halves)
    good, broken = (adapter_of(table, 8, dtype, seed, missing=0) for seed in (1, 2))
    for pair in broken.values():
        pair.a[0, 0] = number
    tokens = [tokens_of(9, 100, seed) for seed in range(6)]
    blends = [(), ((good, 1.0),), ((broken, 1.0),), ((broken, 1.0), (good, 0.5)), ((good, 1.0),), ()]
    alone = [whole(model, each, *blend) for each, blend in zip(tokens, blends, strict=True)]
    sequences = [Sequence(model, each, blend) for each, blend in zip(tokens, blends, strict=True)]
    together = compute(sequences, [[(i, 4) for i in range(6)], [(i, 5) for i in range(6)]], 3)
    assert [bool(each.isfinite().all()) for each in together] == [True, True, False, False, True, True]
    assert not together[2].isfinite().any()
    assert all(equal(a, b) for a, b in zip(together, alone, strict=True) if a.isfinite().all())


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("experts", EXPERTS)
def test_a_broken_token_changes_no_bit_of_the_tokens_before_it(halves, number, experts) -> None:
    """However the sequence is cut: what a later token left in the cache is not seen, nor what its router made of it."""
    table = table_for(halves, experts=experts)
    table.embedding[7] = number
    model = NativeModel(table, halves=halves)
    tokens = [3, 4, 5, 6, 7, 8, 9]
    at_once = whole(model, tokens)
    (one_by_one,) = compute([Sequence(model, tokens)], [[(0, 1)]] * len(tokens), 1)
    assert at_once[:4].isfinite().all()
    assert not at_once[4:].isfinite().any()
    assert equal(at_once[:4], one_by_one[:4])


def test_of_equal_experts_the_first_ones_compute(halves) -> None:
    table, tokens = table_for(halves, experts=(5,), chosen=2), [1, 2, 3]
    for layer in table.layers:
        layer.experts.router.stored.zero_()
    before = whole(NativeModel(table, halves=halves), tokens)
    for number, same in ((4, True), (3, True), (2, True), (1, False), (0, False)):
        table.layers[0].experts.mlps[number]["down"].stored.zero_()
        assert equal(whole(NativeModel(table, halves=halves), tokens), before) == same


def test_values_too_large_for_the_cache_are_infinite(halves) -> None:
    if halves:
        pytest.skip("it multiplies in bfloat16, which holds them")
    table = table_for(halves, dtype=torch.float16)
    for layer in table.layers:
        layer.linears["v"].stored[:] = 60000.0
    model = NativeModel(table, halves=halves)
    assert not whole(model, [1, 2, 3])[1:].isfinite().all()


def test_far_positions(halves) -> None:
    """A long sequence at once, by two chunks and the last token alone."""
    model = model_of(halves, windows=(None, 300))
    tokens = tokens_of(3000, 100, 0)
    at_once = whole(model, tokens, threads=2)
    (cut,) = compute([Sequence(model, tokens, seed=1)], [[(0, 1777)], [(0, 1222)], [(0, 1)]], 2)
    assert equal(at_once, cut)


def test_flushing_of_small_numbers_in_one_thread_changes_nothing(halves) -> None:
    model = model_of(halves, embedding_scale=1e-38, norms="0000")
    tokens = [tokens_of(5, 100, seed) for seed in range(16)]

    def run(threads: int) -> torch.Tensor:
        sequences = [Sequence(model, each) for each in tokens]
        return torch.cat(compute(sequences, [[(i, 5) for i in range(16)]], threads))

    plain = run(1)
    assert torch.set_flush_denormal(True)
    try:
        flushed = run(1), run(3)
    finally:
        torch.set_flush_denormal(False)
    assert all(equal(each, plain) for each in flushed)


def test_threads_of_python_compute_at_the_same_time(halves) -> None:
    table = table_for(halves)
    model = NativeModel(table, halves=halves)
    tokens = [tokens_of(20 + 700 * i, 100, i) for i in range(4)]  # longer ones need longer tables of positions
    alone = [whole(model, each) for each in tokens]
    for _ in range(3):
        fresh = NativeModel(table, halves=halves)
        with ThreadPoolExecutor(4) as pool:
            results = pool.map(lambda each, model=fresh: whole(model, each, threads=2), tokens)
            assert all(equal(a, b) for a, b in zip(results, alone, strict=True))


def test_the_team_wakes_whenever_it_sleeps(halves) -> None:
    """A thousand small steps; pauses of all lengths around the moment at which threads fall asleep."""
    model = model_of(halves, hidden=32, intermediate=32, layers=1)
    sequence = Sequence(model, tokens_of(1000, 100, 0))
    alone = whole(model, sequence.tokens)
    for i in range(1000):
        for _ in range(i % 400 * (i % 3)):
            pass
        if i % 100 == 0:
            time.sleep(0.005)
        sequence.logits.append(run(model, [sequence.chunk(1)], 1 + i % 4))
    assert equal(torch.cat(sequence.logits), alone)


def test_a_child_computes_after_a_fork(halves) -> None:
    model = model_of(halves)
    tokens = tokens_of(40, 100, 0)
    alone = whole(model, tokens, threads=3)
    child = os.fork()
    if not child:
        os._exit(0 if equal(whole(model, tokens, threads=3), alone) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert equal(whole(model, tokens, threads=3), alone)


@pytest.mark.parametrize("scored", [1, 300_000], ids=["in C", "for logits"])
def test_a_step_that_finds_no_memory_says_so_and_the_next_one_computes(halves, scored) -> None:
    """In a child whose memory is limited; nothing was written."""
    model = model_of(halves)
    few, many = tokens_of(5, 100, 0), tokens_of(300_000, 100, 0)
    alone = whole(model, few)
    model.reach(len(many))
    child = os.fork()
    if not child:
        status = 1
        try:
            sequence = Sequence(model, many[:1])
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + 2**27, used + 2**27))
            with pytest.raises(MemoryError, match="send fewer rows"):
                run(model, [replace(sequence.chunk(1), tokens=many, wanted=scored)], 1)
            status = 0 if not sequence.memory.any() and equal(whole(model, few), alone) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
