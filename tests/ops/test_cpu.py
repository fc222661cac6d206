"""The C code is the definition, at every size and where memory moves; and where it cannot be had, others compute."""

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from loradeck.ops import compiler, cpu, dispatch, reference
from loradeck.ops.layer_kinds import LinearForm
from loradeck.ops.mapping import Mix
from loradeck.ops.operands import Operands
from loradeck.ops.weights import Pair

from .conftest import watched

needs_compiler = pytest.mark.skipif(bool(cpu.problem()), reason=f"the C code {cpu.problem()}")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7}


def operands(
    inside: int, outside: int, ranks: tuple[int, ...], dtype: torch.dtype = torch.float32, *, views: bool = True
) -> Operands:
    """Random pairs: as views, as a loaded adapter has them, or as tensors of their own."""
    chance = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        tensor = (torch.randn(shape, generator=chance) / shape[1] ** 0.5).to(dtype)
        return tensor[:] if views else tensor

    pairs = [Pair(drawn(r, inside), drawn(outside, r), 0.5 + number) for number, r in enumerate(ranks)]
    return Operands(LinearForm(inside, outside), tuple(pairs))


def agrees(own: Operands, mix: Mix, tokens: int = 1, dtype: torch.dtype = torch.float32) -> None:
    """Held against the definition on the same tensors in float64."""
    chance = torch.Generator().manual_seed(1)
    form = own.form
    (_, inside), (outside, _) = form.shapes(1)
    x, y = (torch.randn(mix.total, tokens, size, generator=chance).to(dtype) for size in (inside, outside))
    wide = tuple(pair and replace(pair, a=pair.a.double(), b=pair.b.double()) for pair in own.pairs)
    with torch.no_grad():
        wanted = reference.lora(x.double(), y.double(), Operands(form, wide), mix)
        got = cpu.lora(x, y.clone(), own, mix)
    assert got.dtype == dtype
    assert (got.double() - wanted).abs().max() <= TOLERANCE[dtype] * wanted.abs().max()


@needs_compiler
class TestDefinition:
    """y[t] += Σ_a w_a · scaling_a · B_a (A_a x[t])."""

    @pytest.mark.parametrize("half", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    @pytest.mark.parametrize(
        ("inside", "outside"), [(1, 1), (15, 7), (16, 8), (33, 96), (64, 97), (100, 191), (576, 1536)]
    )
    def test_layers_of_any_size(self, inside, outside, dtype, half):
        """Whole vectors and blocks, none of them, and what is left over; of adapters in either precision."""
        entries = (((0, 1.0),), (), ((1, 0.5), (2, -2.0)), ((3, 1.0),), ((0, 0.3),), ((0, 1.0),))
        agrees(operands(inside, outside, (1, 4, 6, 8), half), Mix(entries, (1,) * 6), dtype=dtype)

    @pytest.mark.parametrize("r", [1, 2, 3, 4, 5, 7, 8, 9, 12, 16, 20, 64, 200])
    def test_any_rank(self, r):
        agrees(operands(40, 104, (r, 3)), Mix((((0, 1.0),), ((1, 1.0),), ((0, 1.0), (1, 1.0))), (1,) * 3))

    @pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 9, 64])
    @pytest.mark.parametrize("tokens", [1, 3])
    def test_any_number_of_rows(self, rows, tokens):
        agrees(operands(40, 104, (8,)), Mix((((0, 1.0),),) * rows, (1,) * rows), tokens)

    def test_adapters_of_several_precisions_in_one_batch(self):
        wide, half = operands(40, 24, (4, 8)), operands(40, 24, (5, 8), torch.bfloat16)
        small = operands(40, 24, (3,), torch.float16)
        own = Operands(wide.form, (*wide.pairs, None, *half.pairs, *small.pairs))
        agrees(own, Mix(tuple(((i, 1.0),) for i in range(6)), (1,) * 6))

    def test_a_row_is_the_same_bits_whoever_is_beside_it(self):
        own = operands(100, 191, (8, 5, 16))
        x, y = torch.randn(7, 100), torch.randn(7, 191)
        entries = (*(((0, 1.0),),) * 5, ((1, 1.0),), ((2, 1.0), (0, -1.0)))
        with torch.no_grad():
            together = cpu.lora(x, y.clone(), own, Mix(entries, (1,) * 7))
            alone = [cpu.lora(x[i : i + 1], y[i : i + 1].clone(), own, Mix(entries[i : i + 1], (1,))) for i in range(7)]
        assert torch.equal(together, torch.cat(alone))

    def test_every_number_of_threads_gives_the_same_bits(self):
        own, mix = operands(576, 1536, (8, 16)), Mix((((0, 1.0),), ((1, 1.0),)) * 4, (1,) * 8)
        x, y = torch.randn(8, 576), torch.randn(8, 1536)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(cpu.lora(x, y.clone(), own, mix))
        assert all(torch.equal(results[0], each) for each in results)

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_what_is_broken_next_door_stays_there(self, bad):
        own = operands(40, 24, (4, 4))
        own.pairs[1].b.fill_(bad)
        x, y = torch.randn(4, 40), torch.randn(4, 24)
        x[3] = bad
        mix = Mix((((0, 1.0),), ((1, 1.0),), (), ((0, 1.0),)), (1,) * 4)
        got = cpu.lora(x, y.clone(), own, mix)
        torch.testing.assert_close(got[0], reference.lora(x, y, own, mix)[0])
        assert torch.equal(got[2], y[2])
        assert not got[[1, 3]].isfinite().any()

    def test_bfloat16_is_rounded_to_the_nearest_even(self):
        """As torch does, also where the sum becomes Inf or NaN."""
        values = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 - 2**-10, 3.4e38, math.inf, -math.inf, math.nan, 2**-133])
        own = Operands(LinearForm(1, 8), (Pair(torch.ones(1, 1), values[:, None].clone(), 1.0),))
        got = cpu.lora(
            torch.ones(1, 1).bfloat16(), torch.zeros(1, 8).bfloat16(), own, Mix((((0, 1.0),),), (1,))
        )  # fmt: skip
        torch.testing.assert_close(got[0], values.bfloat16(), rtol=0, atol=0, equal_nan=True)

    def test_sums_are_of_float32(self):
        """bfloat16's sum of a thousand ones would stay at 256."""
        own = operands(1024, 1, (1,), torch.bfloat16)
        own.pairs[0].a.fill_(1)
        own.pairs[0].b.fill_(1)
        own = Operands(own.form, (replace(own.pairs[0], scaling=1.0),))
        x = torch.ones(1, 1024, dtype=torch.bfloat16)
        got = cpu.lora(x, torch.zeros(1, 1, dtype=torch.bfloat16), own, Mix((((0, 1.0),),), (1,)))
        assert got.item() == 1024


@needs_compiler
class TestMemory:
    """Pairs are read where they lie, so what lies there must be what is meant."""

    mix = Mix((((0, 1.0),), ((1, 1.0),)), (1, 1))

    @pytest.mark.parametrize("views", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_a_write_is_seen(self, views, dtype):
        own = operands(40, 24, (4, 8), dtype, views=views)
        agrees(own, self.mix)
        for pair in own.pairs:
            pair.a.mul_(2)
            pair.b[3:].zero_()
        agrees(own, self.mix)

    def test_a_parameter_whose_memory_was_exchanged(self):
        """As `vector_to_parameters` and some optimizers do it; the memory of before may be anybody's."""
        own = operands(40, 24, (4, 8), views=False)
        agrees(own, self.mix)
        own.pairs[0].a.data = torch.randn(4, 40)
        agrees(own, self.mix)

    def test_tensors_with_gaps(self):
        chance = torch.Generator().manual_seed(0)
        a, b = torch.randn(40, 4, generator=chance).t(), torch.randn(24, 8, generator=chance)[:, ::2]
        own = Operands(LinearForm(40, 24), (Pair(a, b, 1.0), Pair(a * 2, b, 1.0)))
        agrees(own, self.mix)
        a.mul_(3)
        agrees(own, self.mix)

    def test_a_layer_s_input_and_output_with_gaps(self):
        own = operands(40, 24, (4, 8))
        x, y = torch.randn(2, 80)[:, ::2], torch.randn(24, 2).t()
        torch.testing.assert_close(cpu.lora(x, y.clone(), own, self.mix), reference.lora(x, y, own, self.mix))

    def test_operands_that_are_gone_are_forgotten(self):
        own = operands(40, 24, (4, 8))
        agrees(own, self.mix)
        before = len(cpu._last)
        del own
        assert len(cpu._last) == before - 1

    @pytest.mark.parametrize("views", [True, False])
    def test_threads_that_compute_with_the_same_pairs(self, views):
        """Each is told of another batch, and what one is told may be forgotten while it computes."""
        own = operands(200, 300, (4, 8, 16), views=views)
        mixes = [Mix(tuple(((i % 3, 1.0),) for i in range(rows)), (1,) * rows) for rows in (3, 5, 40)]
        inputs = [(torch.randn(mix.total, 200), torch.randn(mix.total, 300)) for mix in mixes]
        wanted = [cpu.lora(x, y.clone(), own, mix) for (x, y), mix in zip(inputs, mixes, strict=True)]

        def compute(number: int) -> bool:
            (x, y), mix = inputs[number], mixes[number]
            return all(torch.equal(cpu.lora(x, y.clone(), own, mix), wanted[number]) for _ in range(300))

        with ThreadPoolExecutor(6) as pool:
            assert all(pool.map(compute, [0, 1, 2] * 2))


@needs_compiler
class TestChosen:
    """It computes wherever it can, but for long groups of high ranks."""

    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """The meetings of each call."""
        return watched(monkeypatch, cpu, lambda plan: len(plan.item))

    def test_high_ranks_of_long_groups_are_left_to_dense_products(self, calls):
        own = operands(40, 24, (128, 8, 8))
        entries, lengths = (((0, 1.0),), ((1, 1.0),), ((2, 1.0),)), (300, 300, 1)
        mix = Mix(entries, lengths)
        x, y = torch.randn(1, 601, 40), torch.randn(1, 601, 24)
        with torch.no_grad():
            got = dispatch.lora(x, y.clone(), own, mix, training=False)
        assert calls == [301]
        torch.testing.assert_close(got, reference.lora(x, y, own, mix), atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
    def test_other_precisions_of_a_layer_go_other_ways(self, calls, dtype):
        own = operands(40, 24, (4, 8))
        x, y = torch.randn(2, 40).to(dtype), torch.randn(2, 24).to(dtype)
        mix = Mix((((0, 1.0),), ((1, 1.0),)), (1, 1))
        with torch.no_grad():
            got = dispatch.lora(x, y.clone(), own, mix, training=False)
        torch.testing.assert_close(got, reference.lora(x, y, own, mix), atol=1e-2, rtol=1e-2)
        assert not calls

    def test_a_compiled_model_does_not_trace_it(self, calls):
        own, mix = operands(40, 24, (4, 8)), Mix((((0, 1.0),), ((1, 1.0),)), (1, 1))
        x, y = torch.randn(2, 40), torch.randn(2, 24)
        compiled = torch.compile(lambda x, y: dispatch.lora(x, y, own, mix, training=False), backend="eager")
        with torch.no_grad():
            torch.testing.assert_close(compiled(x, y.clone()), reference.lora(x, y, own, mix))
        assert not calls


class TestWithoutIt:
    """A machine without a compiler, or with one that does not do, computes another way and says why."""

    @pytest.fixture(autouse=True)
    def cache(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
        """An empty one, and nothing remembered."""
        monkeypatch.setenv("LORADECK_CACHE", str(tmp_path / "cache"))
        for known in (cpu.problem, cpu._library):
            known.cache_clear()
        yield tmp_path / "cache"
        for known in (cpu.problem, cpu._library):
            known.cache_clear()

    def test_no_compiler(self, monkeypatch, tmp_path):
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CC", raising=False)
        assert cpu.problem() == "is not to be had here (there is no GCC; install it, or name it in $CC)"
        own, mix = operands(40, 24, (4, 8)), Mix((((0, 1.0),), ((1, 1.0),)), (1, 1))
        x, y = torch.randn(2, 40), torch.randn(2, 24)
        with torch.no_grad():
            got = dispatch.lora(x, y.clone(), own, mix, training=False)
        torch.testing.assert_close(got, reference.lora(x, y, own, mix))

    @pytest.mark.parametrize(
        ("script", "said"),
        [
            ("echo 'x.c:1: error: no such thing' >&2; exit 1", "failed: x.c:1: error: no such thing"),
            ("for last; do :; done; echo garbage > $last", "file too short"),
        ],
        ids=["it fails", "what it makes is no library"],
    )
    def test_a_compiler_that_does_not_do(self, monkeypatch, tmp_path, cache, script, said):
        fake = tmp_path / "cc"
        fake.write_text(f"#!/bin/sh\n{script}\n")
        fake.chmod(0o755)
        monkeypatch.setenv("CC", str(fake))
        assert cpu.problem().startswith("is not to be had here (")
        assert said in cpu.problem()
        kept = cache / "compiled"
        assert not kept.exists() or not [*kept.iterdir()]

    @needs_compiler
    def test_wrong_results_are_found(self, monkeypatch, tmp_path):
        source = tmp_path / "cpu.c"
        source.write_text(cpu.SOURCE.read_text().replace("p->scaling * sum", "sum"))
        monkeypatch.setattr(cpu, "SOURCE", source)
        assert cpu.problem().startswith("is off by")

    @needs_compiler
    def test_warming_up_compiles(self, cache):
        """So that the first request with an adapter does not wait for it."""
        dispatch.warm_up(torch.device("cpu"))
        assert [*(cache / "compiled").iterdir()]

    @needs_compiler
    def test_it_is_compiled_once(self, monkeypatch):
        compiler.loaded(cpu.SOURCE)
        monkeypatch.setattr(compiler, "_compile", None)
        compiler.loaded(cpu.SOURCE)

    @needs_compiler
    def test_a_cache_that_cannot_be_written_to(self, cache):
        cache.write_text("a file")
        assert cpu.problem() == ""

    @needs_compiler
    def test_processes_that_compile_at_once(self, cache):
        code = "from loradeck.ops import native; print(cpu.problem())"
        running = [
            subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ})
            for _ in range(3)
        ]
        assert [process.communicate()[0] for process in running] == ["\n"] * 3
        assert len([*(cache / "compiled").iterdir()]) == 1
