"""The Triton kernels are the definition: on a GPU where there is one, else through Triton's interpreter on the CPU."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip(
    "triton",
    minversion=None if torch.cuda.is_available() else "3.7",  # the interpreter of 3.5 fails on NumPy 2.4
    reason="needs the package triton, as torch's builds for CUDA bring it; without a GPU from 3.7 on",
)


from loradeck.ops import dispatch, portable, reference
from loradeck.ops import gpu as kernels
from loradeck.ops.layer_kinds import LinearKind
from loradeck.ops.mapping import LoraMapping
from loradeck.ops.weights import LayerAdapters, LoraWeights

from .conftest import calls_of

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of Inf and NaN, in the interpreter
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def on_device(adapters: LayerAdapters, *, views: bool = True) -> LayerAdapters:
    """The weights on the device: views, as a loaded adapter has them, or separate tensors."""

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach().to(DEVICE, copy=True)
        return tensor[:] if views else tensor

    weights = tuple(each and replace(each, a=moved(each.a), b=moved(each.b)) for each in adapters.weights)
    return LayerAdapters(adapters.kind, weights)


def run(
    x: torch.Tensor, y: torch.Tensor, adapters: LayerAdapters, mapping: LoraMapping, *, views: bool = True
) -> torch.Tensor:
    """Compute on the device, and return the result on the CPU."""
    segments = mapping.segments(adapters.kind.count(x) // mapping.total, DEVICE)
    with torch.no_grad():
        y = y.to(DEVICE, copy=True)
        return kernels.lora(x.to(DEVICE), y, on_device(adapters, views=views), segments).cpu()


def close(got: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    assert got.shape == wanted.shape
    assert (got.double() - wanted).abs().max() <= tolerance * max(1.0, wanted.abs().max().item())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *(("linear", dtype) for dtype in TOLERANCE),
        ("linear of tokens", torch.float32),
        ("transformers' Conv1D", torch.bfloat16),
    ],
    ids=str,
)
def test_it_is_the_definition(make, kind, entries, dtype):
    """Mixed ranks, every mapping; rows of the base alone are the base's bit for bit."""
    case = make(kind, dtype=dtype)
    wanted = torch.stack([case.defined(row, entry) for row, entry in enumerate(entries)])
    base = torch.tensor([not entry for entry in entries])
    got = run(case.x, case.y, case.adapters, LoraMapping(entries, (1,) * len(entries)))
    assert got.dtype == dtype
    assert torch.equal(got[base], case.y[base])
    close(got, wanted, TOLERANCE[dtype])


@pytest.mark.slow
@pytest.mark.parametrize(("inside", "outside", "r"), [(1, 1, 1), (1025, 1030, 4), (2100, 33, 16), (70, 1100, 200)])
def test_layers_of_any_size(inside, outside, r):
    """Several pieces of features, several blocks of them, ranks in several turns, and what is left over of each."""
    rng = torch.Generator().manual_seed(0)
    pairs = [
        LoraWeights(
            torch.randn(own, inside, generator=rng) / inside**0.5, torch.randn(outside, own, generator=rng), 0.5
        )
        for own in (r, max(1, r - 1))
    ]
    x, y = torch.randn(4, inside, generator=rng), torch.randn(4, outside, generator=rng)
    adapters = LayerAdapters(LinearKind(inside, outside), tuple(pairs))
    mapping = LoraMapping((((0, 1.0),), (), ((1, 2.0), (0, 0.5))), (1, 1, 2))
    close(run(x, y, adapters, mapping), reference.lora(x, y, adapters, mapping).double(), 1e-5)


def test_what_does_not_lie_in_one_piece():
    """Every other row of a larger tensor, and features that are the columns of another."""
    adapters = LayerAdapters(LinearKind(6, 5), (LoraWeights(torch.randn(2, 6), torch.randn(5, 2), 1.0),))
    x, y, mapping = (
        torch.randn(6, 8).T[::2],
        torch.randn(4, 5),
        LoraMapping((((0, 1.0),), (), ((0, 0.5),), ()), (1,) * 4),
    )
    close(run(x, y, adapters, mapping), reference.lora(x, y, adapters, mapping).double(), 1e-5)


def test_an_adapter_that_leaves_the_layer_alone(make):
    case = make("linear")
    entries = tuple(((i % 5, 1.0), (i % 3, -0.5)) if i % 4 else () for i in range(8))
    weights = tuple(None if i % 2 else each for i, each in enumerate(case.adapters.weights))
    case.adapters = LayerAdapters(case.adapters.kind, weights)
    wanted = torch.stack([case.defined(row, entry) for row, entry in enumerate(entries)])
    close(run(case.x, case.y, case.adapters, LoraMapping(entries, (1,) * 8)), wanted, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [(2, 3, 1, 2), (1, 1, 1, 5)])
def test_packed_rows(make, lengths):
    case = make("linear")
    own = (((0, 1.0),), (), ((5, 0.5), (2, -1.0)), ((0, 1.0),))
    tokens = [entry for entry, length in zip(own, lengths, strict=True) for _ in range(length)]
    wanted = torch.stack([case.defined(row, entry) for row, entry in enumerate(tokens)])
    close(run(case.x[None], case.y[None], case.adapters, LoraMapping(own, lengths))[0], wanted, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("views", [True, False])
def test_adapters_of_several_dtypes_in_one_batch(make, views):
    """Each is read in its own dtype; float64 is cast first."""
    case = make("linear")
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    weights = tuple(
        replace(each, a=each.a.to(dtypes[i % 4]), b=each.b.to(dtypes[i % 4]))
        for i, each in enumerate(case.adapters.weights)
    )
    case.adapters = LayerAdapters(case.adapters.kind, weights)
    entries = tuple(((i, 1.0), ((i + 1) % 8, -0.5)) for i in range(8))
    wanted = torch.stack([case.defined(row, entry) for row, entry in enumerate(entries)])
    close(run(case.x, case.y, case.adapters, LoraMapping(entries, (1,) * 8), views=views), wanted, 1e-5)


def test_a_write_and_exchanged_memory_are_seen():
    """Weights are read by address."""
    adapters = LayerAdapters(LinearKind(6, 5), (LoraWeights(torch.randn(2, 6), torch.randn(5, 2), 1.0),) * 2)
    mapping, x, y = LoraMapping((((0, 1.0),), ((1, 1.0),)), (1, 1)), torch.randn(2, 6), torch.randn(2, 5)
    for views in (True, False):
        moved = on_device(adapters, views=views)
        for weights in moved.weights:
            weights.a.mul_(2)
            if not views:
                weights.b.data = torch.randn(5, 2).to(DEVICE)
            with torch.no_grad():
                got = kernels.lora(x.to(DEVICE), y.to(DEVICE, copy=True), moved, mapping.segments(1, DEVICE))
                wanted = reference.lora(x.to(DEVICE), y.to(DEVICE), moved, mapping)
            close(got.cpu(), wanted.cpu().double(), 1e-5)


def test_sums_are_of_float32():
    """A thousand ones and a thousand times 2⁻⁹: bfloat16's sum would stay at 256 and lose the rest."""
    adapters = LayerAdapters(LinearKind(1024, 1), (LoraWeights(torch.ones(1, 1024), torch.ones(1, 1), 1.0),))
    x, mapping = torch.ones(2, 1024, dtype=torch.bfloat16), LoraMapping((((0, 1.0),), ()), (1, 1))
    x[:, ::2] = 2**-9
    assert run(x, torch.zeros(2, 1, dtype=torch.bfloat16), adapters, mapping)[:, 0].tolist() == [512, 0]
    adapters = LayerAdapters(LinearKind(1024, 1), (LoraWeights(torch.ones(1, 1024), torch.full((1, 1), 2.0**9), 1.0),))
    assert run(x, torch.zeros(2, 1, dtype=torch.bfloat16), adapters, mapping)[:, 0].tolist() == [513 * 512 - 512, 0]


# Two sound rows of adapters 0 and 2, a base row, and the broken adapter 1 between them; then two more of 0 and 1.
ENTRIES = (((0, 1.0),), ((1, 1.0),), (), ((2, 0.5), (0, 1.0)), ((0, 1.0),), ((1, 1.0), (2, 1.0)))
SOUND = [0, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["a", "b", "x"])
def test_a_neighbours_nan_stays_there(make, bad, where):
    case = make("linear", count=3)
    with torch.no_grad():
        clean = run(case.x[:6], case.y[:6], case.adapters, LoraMapping(ENTRIES, (1,) * 6))
        if where == "x":
            case.x[[1, 5]] = bad
        else:
            getattr(case.adapters.weights[1], where).fill_(bad)
        got = run(case.x[:6], case.y[:6], case.adapters, LoraMapping(ENTRIES, (1,) * 6))
    assert torch.equal(got[SOUND], clean[SOUND])  # bit for bit: the sums of other rows are the same
    assert torch.equal(got[2], case.y[2])
    assert not bool(torch.isfinite(got[[1, 5]]).any())


@pytest.mark.parametrize("weight", [1e39, -1e308])
def test_a_weight_beyond_the_dtype_changes_no_other_row(weight):
    adapters = LayerAdapters(LinearKind(4, 3), (LoraWeights(torch.randn(2, 4), torch.randn(3, 2), 16.0),))
    x, y = torch.randn(3, 4), torch.randn(3, 3)
    got = run(x, y, adapters, LoraMapping((((0, weight),), (), ()), (1,) * 3))
    assert torch.equal(got[1:], y[1:])
    assert not bool(torch.isfinite(got[0]).all())


def test_the_self_check_passes_and_can_fail(monkeypatch):
    assert kernels.why_not_available(DEVICE) is None
    with torch.inference_mode():
        assert kernels.why_not_available(DEVICE) is None
    monkeypatch.setattr(kernels, "_update", lambda *_: None)
    assert "is off by" in kernels.why_not_available(DEVICE)
    monkeypatch.setattr(kernels, "_update", lambda *_: [][0])
    assert kernels.why_not_available(DEVICE) == "is unavailable (list index out of range)"


class TestDispatch:
    """The kernels are used on a GPU for short segments of several adapters, and never on a CPU."""

    mapping = LoraMapping(tuple(((i, 1.0),) for i in range(4)), (1,) * 4)

    @pytest.fixture
    def used(self, monkeypatch) -> Callable[..., list[str]]:
        calls = {name: calls_of(monkeypatch, module) for name, module in (("portable", portable), ("gpu", kernels))}

        def used(dtype: torch.dtype, device: torch.device) -> list[str]:
            weights = [LoraWeights(torch.randn(2, 4), torch.randn(3, 2), 1.0) for _ in range(4)]
            moved = tuple(LoraWeights(w.a.to(device, dtype), w.b.to(device, dtype), 1.0) for w in weights)
            x, y = torch.randn(4, 4).to(device, dtype), torch.randn(4, 3).to(device, dtype)
            for segments in calls.values():
                segments.clear()
            with torch.no_grad():
                dispatch.lora(x, y, LayerAdapters(LinearKind(4, 3), moved), self.mapping, training=False)
            return [name for name, segments in calls.items() if segments]

        return used

    def test_never_on_a_cpu(self, used):
        cpu = torch.device("cpu")
        assert dispatch.why_not_triton(cpu) == "is for GPUs"
        assert used(torch.float64, cpu) == ["portable"]
        assert "gpu" not in used(torch.float32, cpu)

    @pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
    def test_on_a_gpu_except_for_float64(self, used):
        assert dispatch.why_not_triton(DEVICE) is None
        assert used(torch.float32, DEVICE) == ["gpu"]
        assert used(torch.bfloat16, DEVICE) == ["gpu"]
        assert used(torch.float64, DEVICE) == ["portable"]


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from loradeck.ops import gpu as kernels

kinds = {"x": "*bf16", "z": "*bf16", "h": "*fp32", "weights": "*fp32", "scaling": "*fp32", "table": "*i64",
         "token_indices": "*i64", "pair_adapters": "*i64", "starts": "*i64", "order": "*i64"}
for capability in (80, 90):
    for width in (4, 16, 256):
        ranks = min(width, kernels.RANKS)
        sizes = {"W": width, "R": ranks, "BLOCK": kernels.TILE // ranks}
        for kernel, fixed in ((kernels._shrink, sizes | {"PIECE": kernels.PIECE}), (kernels._expand, sizes)):
            signature = {name: "constexpr" if name in fixed else kinds.get(name, "i32") for name in kernel.arg_names}
            made = triton.compile(ASTSource(kernel, signature, constexprs=fixed), target=GPUTarget("cuda", capability, 32))
            assert made.asm["cubin"], (kernel, capability, width)
print("compiled")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
def test_it_compiles_for_gpus_that_are_not_here(tmp_path: Path):
    """To machine code of an A100 and an H100: the interpreter takes more than the compiler does."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "compiled", done.stderr
