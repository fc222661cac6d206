"""The C code agrees with the definition at every size and when memory moves; without it, torch computes the update."""

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from loradeck.ops import compiler, cpu, dispatch, reference
from loradeck.ops.layer_kinds import LinearKind
from loradeck.ops.mapping import LoraMapping
from loradeck.ops.segments import Segments
from loradeck.ops.weights import LayerAdapters, LoraWeights

from .conftest import calls_of, of_mapping

needs_compiler = pytest.mark.skipif(cpu.why_not_available() is not None, reason=f"the C code {cpu.why_not_available()}")
update = of_mapping(cpu.lora)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7}


def layer(
    inside: int, outside: int, ranks: tuple[int, ...], dtype: torch.dtype = torch.float32, *, views: bool = True
) -> LayerAdapters:
    """Random weights: views, as a loaded adapter has them, or separate tensors."""
    rng = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        tensor = (torch.randn(shape, generator=rng) / shape[1] ** 0.5).to(dtype)
        return tensor[:] if views else tensor

    weights = [LoraWeights(drawn(r, inside), drawn(outside, r), 0.5 + number) for number, r in enumerate(ranks)]
    return LayerAdapters(LinearKind(inside, outside), tuple(weights))


def agrees(adapters: LayerAdapters, mapping: LoraMapping, tokens: int = 1, dtype: torch.dtype = torch.float32) -> None:
    """Compared with the definition on the same tensors in float64."""
    rng = torch.Generator().manual_seed(1)
    (_, inside), (outside, _) = adapters.kind.shapes(1)
    x, y = (torch.randn(mapping.total, tokens, size, generator=rng).to(dtype) for size in (inside, outside))
    wide = tuple(each and replace(each, a=each.a.double(), b=each.b.double()) for each in adapters.weights)
    with torch.no_grad():
        wanted = reference.lora(x.double(), y.double(), LayerAdapters(adapters.kind, wide), mapping)
        got = update(x, y.clone(), adapters, mapping)
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
        agrees(layer(inside, outside, (1, 4, 6, 8), half), LoraMapping(entries, (1,) * 6), dtype=dtype)

    @pytest.mark.parametrize("r", [1, 2, 3, 4, 5, 7, 8, 9, 12, 16, 20, 64, 200])
    def test_any_rank(self, r):
        agrees(layer(40, 104, (r, 3)), LoraMapping((((0, 1.0),), ((1, 1.0),), ((0, 1.0), (1, 1.0))), (1,) * 3))

    @pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 9, 64])
    @pytest.mark.parametrize("tokens", [1, 3])
    def test_any_number_of_rows(self, rows, tokens):
        agrees(layer(40, 104, (8,)), LoraMapping((((0, 1.0),),) * rows, (1,) * rows), tokens)

    def test_adapters_of_several_precisions_in_one_batch(self):
        wide, half = layer(40, 24, (4, 8)), layer(40, 24, (5, 8), torch.bfloat16)
        small = layer(40, 24, (3,), torch.float16)
        own = LayerAdapters(wide.kind, (*wide.weights, None, *half.weights, *small.weights))
        agrees(own, LoraMapping(tuple(((i, 1.0),) for i in range(6)), (1,) * 6))

    def test_a_row_is_the_same_bits_whoever_is_beside_it(self):
        own = layer(100, 191, (8, 5, 16))
        x, y = torch.randn(7, 100), torch.randn(7, 191)
        entries = (*(((0, 1.0),),) * 5, ((1, 1.0),), ((2, 1.0), (0, -1.0)))
        with torch.no_grad():
            together = update(x, y.clone(), own, LoraMapping(entries, (1,) * 7))
            alone = [
                update(x[i : i + 1], y[i : i + 1].clone(), own, LoraMapping(entries[i : i + 1], (1,))) for i in range(7)
            ]
        assert torch.equal(together, torch.cat(alone))

    def test_every_number_of_threads_gives_the_same_bits(self):
        own, mapping = layer(576, 1536, (8, 16)), LoraMapping((((0, 1.0),), ((1, 1.0),)) * 4, (1,) * 8)
        x, y = torch.randn(8, 576), torch.randn(8, 1536)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(update(x, y.clone(), own, mapping))
        assert all(torch.equal(results[0], each) for each in results)

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_a_neighbours_nan_stays_there(self, bad):
        own = layer(40, 24, (4, 4))
        own.weights[1].b.fill_(bad)
        x, y = torch.randn(4, 40), torch.randn(4, 24)
        x[3] = bad
        mapping = LoraMapping((((0, 1.0),), ((1, 1.0),), (), ((0, 1.0),)), (1,) * 4)
        got = update(x, y.clone(), own, mapping)
        torch.testing.assert_close(got[0], reference.lora(x, y, own, mapping)[0])
        assert torch.equal(got[2], y[2])
        assert not got[[1, 3]].isfinite().any()

    def test_bfloat16_is_rounded_to_the_nearest_even(self):
        """As torch does, also where the sum becomes Inf or NaN."""
        values = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 - 2**-10, 3.4e38, math.inf, -math.inf, math.nan, 2**-133])
        own = LayerAdapters(LinearKind(1, 8), (LoraWeights(torch.ones(1, 1), values[:, None].clone(), 1.0),))
        got = update(
            torch.ones(1, 1).bfloat16(), torch.zeros(1, 8).bfloat16(), own, LoraMapping((((0, 1.0),),), (1,))
        )  # fmt: skip
        torch.testing.assert_close(got[0], values.bfloat16(), rtol=0, atol=0, equal_nan=True)

    def test_sums_are_of_float32(self):
        """bfloat16's sum of a thousand ones would stay at 256."""
        own = layer(1024, 1, (1,), torch.bfloat16)
        own.weights[0].a.fill_(1)
        own.weights[0].b.fill_(1)
        own = LayerAdapters(own.kind, (replace(own.weights[0], scaling=1.0),))
        x = torch.ones(1, 1024, dtype=torch.bfloat16)
        got = update(x, torch.zeros(1, 1, dtype=torch.bfloat16), own, LoraMapping((((0, 1.0),),), (1,)))
        assert got.item() == 1024


@needs_compiler
class TestMemory:
    """Weights are read by address, so the addresses must be valid and current."""

    mapping = LoraMapping((((0, 1.0),), ((1, 1.0),)), (1, 1))

    @pytest.mark.parametrize("views", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_a_write_is_seen(self, views, dtype):
        own = layer(40, 24, (4, 8), dtype, views=views)
        agrees(own, self.mapping)
        for each in own.weights:
            each.a.mul_(2)
            each.b[3:].zero_()
        agrees(own, self.mapping)

    def test_a_parameter_whose_memory_was_exchanged(self):
        """As `vector_to_parameters` and some optimizers do; the old memory may be reused by then."""
        own = layer(40, 24, (4, 8), views=False)
        agrees(own, self.mapping)
        own.weights[0].a.data = torch.randn(4, 40)
        agrees(own, self.mapping)

    def test_tensors_with_gaps(self):
        rng = torch.Generator().manual_seed(0)
        a, b = torch.randn(40, 4, generator=rng).t(), torch.randn(24, 8, generator=rng)[:, ::2]
        own = LayerAdapters(LinearKind(40, 24), (LoraWeights(a, b, 1.0), LoraWeights(a * 2, b, 1.0)))
        agrees(own, self.mapping)
        a.mul_(3)
        agrees(own, self.mapping)

    def test_a_layer_s_input_and_output_with_gaps(self):
        own = layer(40, 24, (4, 8))
        x, y = torch.randn(2, 80)[:, ::2], torch.randn(24, 2).t()
        torch.testing.assert_close(update(x, y.clone(), own, self.mapping), reference.lora(x, y, own, self.mapping))

    def test_fixed_weights_are_looked_up_once(self, monkeypatch):
        """Views keep their memory; separate tensors are looked up at each call."""
        lookups: list[int] = []
        address = LoraWeights.address
        monkeypatch.setattr(LoraWeights, "address", lambda weights: lookups.append(weights.r) or address(weights))
        fixed, separate = layer(40, 24, (4, 8)), layer(40, 24, (4, 8), views=False)
        for own, expected in ((fixed, [4, 8]), (separate, [4, 8] * 3)):
            lookups.clear()
            for _ in range(3):
                agrees(own, self.mapping)
            assert lookups == expected

    @pytest.mark.parametrize("views", [True, False])
    def test_threads_that_compute_with_the_same_pairs(self, views):
        """Each has another batch."""
        own = layer(200, 300, (4, 8, 16), views=views)
        mappings = [LoraMapping(tuple(((i % 3, 1.0),) for i in range(rows)), (1,) * rows) for rows in (3, 5, 40)]
        inputs = [(torch.randn(mapping.total, 200), torch.randn(mapping.total, 300)) for mapping in mappings]
        wanted = [update(x, y.clone(), own, mapping) for (x, y), mapping in zip(inputs, mappings, strict=True)]

        def compute(number: int) -> bool:
            (x, y), mapping = inputs[number], mappings[number]
            return all(torch.equal(update(x, y.clone(), own, mapping), wanted[number]) for _ in range(300))

        with ThreadPoolExecutor(6) as pool:
            assert all(pool.map(compute, [0, 1, 2] * 2))


@needs_compiler
class TestDispatch:
    """It computes whatever it can, except long segments of high ranks."""

    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[Segments]:
        """The segments of each call."""
        return calls_of(monkeypatch, cpu)

    def test_long_segments_of_high_ranks_are_left_to_dense_products(self, calls):
        own = layer(40, 24, (128, 8, 8))
        entries, lengths = (((0, 1.0),), ((1, 1.0),), ((2, 1.0),)), (300, 300, 1)
        mapping = LoraMapping(entries, lengths)
        x, y = torch.randn(1, 601, 40), torch.randn(1, 601, 24)
        with torch.no_grad():
            got = dispatch.lora(x, y.clone(), own, mapping, training=False)
        assert [segments.lengths for segments in calls] == [(300, 1)]
        torch.testing.assert_close(got, reference.lora(x, y, own, mapping), atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
    def test_layers_of_other_dtypes(self, calls, dtype):
        own = layer(40, 24, (4, 8))
        x, y = torch.randn(2, 40).to(dtype), torch.randn(2, 24).to(dtype)
        mapping = LoraMapping((((0, 1.0),), ((1, 1.0),)), (1, 1))
        with torch.no_grad():
            got = dispatch.lora(x, y.clone(), own, mapping, training=False)
        torch.testing.assert_close(got, reference.lora(x, y, own, mapping), atol=1e-2, rtol=1e-2)
        assert not calls

    @pytest.mark.slow
    def test_a_compiled_model_does_not_trace_it(self, calls):
        own, mapping = layer(40, 24, (4, 8)), LoraMapping((((0, 1.0),), ((1, 1.0),)), (1, 1))
        x, y = torch.randn(2, 40), torch.randn(2, 24)
        compiled = torch.compile(lambda x, y: dispatch.lora(x, y, own, mapping, training=False), backend="eager")
        with torch.no_grad():
            torch.testing.assert_close(compiled(x, y.clone()), reference.lora(x, y, own, mapping))
        assert not calls


class TestCompiler:
    """Without a working compiler torch computes the update, and the reason is reported."""

    @pytest.fixture(autouse=True)
    def cache(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
        """An empty cache folder, and no library loaded."""
        monkeypatch.setenv("LORADECK_CACHE", str(tmp_path / "cache"))
        for cached in (cpu.why_not_available, cpu._library):
            cached.cache_clear()
        yield tmp_path / "cache"
        for cached in (cpu.why_not_available, cpu._library):
            cached.cache_clear()

    def test_no_compiler(self, monkeypatch, tmp_path):
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CC", raising=False)
        assert cpu.why_not_available() == "is unavailable (no C compiler; install gcc or clang, or set $CC)"
        own, mapping = layer(40, 24, (4, 8)), LoraMapping((((0, 1.0),), ((1, 1.0),)), (1, 1))
        x, y = torch.randn(2, 40), torch.randn(2, 24)
        with torch.no_grad():
            got = dispatch.lora(x, y.clone(), own, mapping, training=False)
        torch.testing.assert_close(got, reference.lora(x, y, own, mapping))

    @needs_compiler
    def test_without_a_compiler_the_prebuilt_library_of_this_very_code(self, monkeypatch, tmp_path):
        folder, other = tmp_path / "prebuilt", tmp_path / "other" / "cpu.c"
        folder.mkdir()
        compiler.prebuild(cpu.SOURCE, "", torch.backends.cpu.get_cpu_capability(), folder)
        monkeypatch.setattr(compiler, "PREBUILT", folder)
        assert cpu.why_not_available() is None
        assert cpu.origin() == "compiled on this machine"
        cpu._library.cache_clear()
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CC", raising=False)
        assert cpu.origin() == "prebuilt"
        agrees(layer(40, 24, (4, 8)), LoraMapping((((0, 1.0),), ((1, 1.0),)), (1, 1)))
        other.parent.mkdir()
        other.write_text(cpu.SOURCE.read_text() + "/* later */")
        with pytest.raises(OSError, match="no C compiler"):
            compiler.load(other)
        with pytest.raises(OSError, match="no C compiler"):
            compiler.load(cpu.SOURCE, "-DOTHER")

    @pytest.mark.parametrize(
        ("script", "message"),
        [
            ("echo 'x.c:1: error: no such thing' >&2; exit 1", "failed: x.c:1: error: no such thing"),
            ("for last; do :; done; echo garbage > $last", "file too short"),
        ],
        ids=["it fails", "it writes no library"],
    )
    def test_a_broken_compiler(self, monkeypatch, tmp_path, cache, script, message):
        fake = tmp_path / "cc"
        fake.write_text(f"#!/bin/sh\n{script}\n")
        fake.chmod(0o755)
        monkeypatch.setenv("CC", str(fake))
        assert cpu.why_not_available().startswith("is unavailable (")
        assert message in cpu.why_not_available()
        compiled = cache / "compiled"
        assert not compiled.exists() or not [*compiled.iterdir()]

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["gcc", "clang"])
    def test_each_compiler(self, monkeypatch, name):
        if shutil.which(name) is None:
            pytest.skip(f"{name} is not installed")
        monkeypatch.setenv("CC", name)
        assert cpu.why_not_available() is None
        agrees(layer(576, 1536, (8, 16)), LoraMapping((((0, 1.0),), ((1, 1.0),)) * 4, (1,) * 8), tokens=4)

    @pytest.mark.slow
    @needs_compiler
    def test_the_first_call_may_be_in_inference_mode(self):
        with torch.inference_mode():
            assert cpu.why_not_available() is None

    @pytest.mark.slow
    @needs_compiler
    def test_wrong_results_are_found(self, monkeypatch, tmp_path):
        source = tmp_path / "cpu.c"
        source.write_text(cpu.SOURCE.read_text().replace("scaling * sum", "sum"))
        monkeypatch.setattr(cpu, "SOURCE", source)
        assert cpu.why_not_available().startswith("is off by")

    @pytest.mark.slow
    @needs_compiler
    def test_warming_up_compiles(self, cache):
        """So that the first request with an adapter does not wait for it."""
        dispatch.warm_up(torch.device("cpu"))
        assert [*(cache / "compiled").iterdir()]

    @pytest.mark.slow
    @needs_compiler
    def test_it_is_compiled_once(self, monkeypatch):
        compiler.load(cpu.SOURCE)
        monkeypatch.setattr(compiler, "_compile", None)
        compiler.load(cpu.SOURCE)

    @pytest.mark.slow
    @needs_compiler
    def test_a_cache_that_cannot_be_written_to(self, cache):
        cache.write_text("a file")
        assert cpu.why_not_available() is None

    @pytest.mark.slow
    @needs_compiler
    def test_processes_that_compile_at_once(self, cache):
        code = "from loradeck.ops import cpu; print(cpu.why_not_available())"
        running = [
            subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ})
            for _ in range(3)
        ]
        assert [process.communicate()[0] for process in running] == ["None\n"] * 3
        assert len([*(cache / "compiled").iterdir()]) == 1
