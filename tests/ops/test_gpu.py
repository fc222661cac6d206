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

from loradeck.ops import dispatch, plan, portable, reference, stacked
from loradeck.ops import gpu as kernels
from loradeck.ops.layer_kinds import LinearForm
from loradeck.ops.mapping import Mix
from loradeck.ops.operands import Operands
from loradeck.ops.plan import plan_of
from loradeck.ops.weights import Pair

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of Inf and NaN, in the interpreter
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.fixture(autouse=True)
def every_row_in_stacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is cheaper."""
    monkeypatch.setattr(plan, "SEGMENT", 1e9)


def run(x: torch.Tensor, y: torch.Tensor, operands: Operands, mix: Mix) -> torch.Tensor:
    """Compute on the device, and return what it gives on the CPU."""
    pairs = tuple(pair and replace(pair, a=pair.a.to(DEVICE), b=pair.b.to(DEVICE)) for pair in operands.pairs)
    own = Operands(operands.form, pairs, operands.slots)
    with torch.no_grad():
        return kernels.lora(x.to(DEVICE), y.to(DEVICE, copy=True), own, mix).cpu()


def close(got: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    assert got.shape == wanted.shape
    assert (got.double() - wanted).abs().max() <= tolerance * max(1.0, wanted.abs().max().item())


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
    """Mixed ranks, every mix; rows of the base alone are the base's bit for bit."""
    case = make(kind, dtype=dtype)
    wanted = torch.stack([case.defined(row, entry) for row, entry in enumerate(entries)])
    base = torch.tensor([not entry for entry in entries])
    got = run(case.x, case.y, case.operands, Mix(entries, (1,) * len(entries)))
    assert got.dtype == dtype
    assert torch.equal(got[base], case.y[base])
    close(got, wanted, TOLERANCE[dtype])


@pytest.mark.parametrize(("inside", "outside", "r"), [(1, 1, 1), (1025, 1030, 4), (2100, 33, 16), (70, 1100, 200)])
def test_layers_of_any_size(inside, outside, r):
    """Several pieces of features, several blocks of them, ranks in several turns, and what is left over of each."""
    chance = torch.Generator().manual_seed(0)
    pairs = [
        Pair(torch.randn(own, inside, generator=chance) / inside**0.5, torch.randn(outside, own, generator=chance), 0.5)
        for own in (r, max(1, r - 1))
    ]
    x, y = torch.randn(4, inside, generator=chance), torch.randn(4, outside, generator=chance)
    operands = Operands(LinearForm(inside, outside), tuple(pairs))
    mix = Mix((((0, 1.0),), (), ((1, 2.0), (0, 0.5))), (1, 1, 2))
    close(run(x, y, operands, mix), reference.lora(x, y, operands, mix).double(), 1e-5)


def test_what_does_not_lie_in_one_piece():
    """Every other row of a larger tensor, and features that are the columns of another."""
    operands = Operands(LinearForm(6, 5), (Pair(torch.randn(2, 6), torch.randn(5, 2), 1.0),))
    x, y, mix = torch.randn(6, 8).T[::2], torch.randn(4, 5), Mix((((0, 1.0),), (), ((0, 0.5),), ()), (1,) * 4)
    close(run(x, y, operands, mix), reference.lora(x, y, operands, mix).double(), 1e-5)


def test_an_adapter_that_leaves_the_layer_alone(make):
    case = make("linear")
    entries = tuple(((i % 5, 1.0), (i % 3, -0.5)) if i % 4 else () for i in range(8))
    case.operands.pairs = tuple(None if i % 2 else pair for i, pair in enumerate(case.operands.pairs))
    wanted = torch.stack([case.defined(row, entry) for row, entry in enumerate(entries)])
    close(run(case.x, case.y, case.operands, Mix(entries, (1,) * 8)), wanted, 1e-5)


@pytest.mark.parametrize("lengths", [(2, 3, 1, 2), (1, 1, 1, 5)])
def test_packed_rows(make, lengths):
    case = make("linear")
    own = (((0, 1.0),), (), ((5, 0.5), (2, -1.0)), ((0, 1.0),))
    tokens = [entry for entry, length in zip(own, lengths, strict=True) for _ in range(length)]
    wanted = torch.stack([case.defined(row, entry) for row, entry in enumerate(tokens)])
    close(run(case.x[None], case.y[None], case.operands, Mix(own, lengths))[0], wanted, 1e-5)


def test_what_the_plan_leaves_to_others_is_left(make, monkeypatch):
    """Single tokens of many, and a chunk of somebody's prompt, which is not in stacks."""
    monkeypatch.undo()
    torch.manual_seed(0)
    operands = Operands(LinearForm(4, 3), tuple(Pair(torch.randn(2, 4), torch.randn(3, 2), 1.0) for _ in range(6)))
    mix = Mix(tuple(((i, 1.0),) for i in range(6)), (1, 1, 1, 1, 1, 200))
    x, y = torch.randn(1, 205, 4), torch.randn(1, 205, 3)
    got = run(x, y, operands, mix)
    groups = plan_of(mix, operands.slots, 1, DEVICE).groups
    assert [group.entry for group in groups] == [((5, 1.0),)]
    assert torch.equal(got[:, 5:], y[:, 5:])
    with torch.no_grad():
        whole = portable.lora(x, got, operands, mix, groups)
    close(whole, reference.lora(x, y, operands, mix).double(), 1e-5)


def test_sums_are_of_float32():
    """A thousand ones and a thousand times 2⁻⁹: bfloat16's sum would stay at 256 and lose the rest."""
    operands = Operands(LinearForm(1024, 1), (Pair(torch.ones(1, 1024), torch.ones(1, 1), 1.0),))
    x, mix = torch.ones(2, 1024, dtype=torch.bfloat16), Mix((((0, 1.0),), ()), (1, 1))
    x[:, ::2] = 2**-9
    assert run(x, torch.zeros(2, 1, dtype=torch.bfloat16), operands, mix)[:, 0].tolist() == [512, 0]
    operands = Operands(LinearForm(1024, 1), (Pair(torch.ones(1, 1024), torch.full((1, 1), 2.0**9), 1.0),))
    assert run(x, torch.zeros(2, 1, dtype=torch.bfloat16), operands, mix)[:, 0].tolist() == [513 * 512 - 512, 0]


# Two sound rows of adapters 0 and 2, a base row, and the broken adapter 1 between them; then two more of 0 and 1.
ENTRIES = (((0, 1.0),), ((1, 1.0),), (), ((2, 0.5), (0, 1.0)), ((0, 1.0),), ((1, 1.0), (2, 1.0)))
SOUND = [0, 2, 3, 4]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["a", "b", "x"])
def test_what_is_broken_next_door_stays_there(make, bad, where):
    case = make("linear", count=3)
    with torch.no_grad():
        clean = run(case.x[:6], case.y[:6], case.operands, Mix(ENTRIES, (1,) * 6))
        if where == "x":
            case.x[[1, 5]] = bad
        else:
            getattr(case.operands.pairs[1], where).fill_(bad)
        got = run(case.x[:6], case.y[:6], case.operands, Mix(ENTRIES, (1,) * 6))
    assert torch.equal(got[SOUND], clean[SOUND])  # to the bit: no sum of another row is another one
    assert torch.equal(got[2], case.y[2])
    assert not bool(torch.isfinite(got[[1, 5]]).any())


@pytest.mark.parametrize("weight", [1e39, -1e308])
def test_a_weight_beyond_the_dtype_changes_no_other_row(weight):
    operands = Operands(LinearForm(4, 3), (Pair(torch.randn(2, 4), torch.randn(3, 2), 16.0),))
    x, y = torch.randn(3, 4), torch.randn(3, 3)
    got = run(x, y, operands, Mix((((0, weight),), (), ()), (1,) * 3))
    assert torch.equal(got[1:], y[1:])
    assert not bool(torch.isfinite(got[0]).all())


def test_its_trial_passes_and_can_fail(monkeypatch):
    monkeypatch.undo()  # with the costs as they are, the trial does reach the kernels
    assert kernels.problem(DEVICE) == ""
    monkeypatch.setattr(kernels, "_update", lambda *_: None)
    assert "is off by" in kernels.problem(DEVICE)
    monkeypatch.setattr(kernels, "_update", lambda *_: [][0])
    assert kernels.problem(DEVICE) == "is not to be had here (list index out of range)"


class TestChosen:
    """`choose` takes the kernels on a GPU, and never on a CPU."""

    entries = tuple(((i, 1.0),) for i in range(4))
    mix = Mix(entries, (1,) * 4)

    @pytest.fixture
    def ways(self, monkeypatch) -> Callable[..., list[str]]:
        taken: list[str] = []
        for name, module in (("stacked", stacked), ("triton", kernels)):
            own = module.lora
            monkeypatch.setattr(module, "lora", lambda *args, own=own, name=name: taken.append(name) or own(*args))

        def ways(dtype: torch.dtype, device: torch.device) -> list[str]:
            pairs = [Pair(torch.randn(2, 4), torch.randn(3, 2), 1.0) for _ in range(4)]
            moved = tuple(Pair(p.a.to(device, dtype), p.b.to(device, dtype), 1.0) for p in pairs)
            x, y = torch.randn(4, 4).to(device, dtype), torch.randn(4, 3).to(device, dtype)
            taken.clear()
            with torch.no_grad():
                dispatch.lora(x, y, Operands(LinearForm(4, 3), moved), self.mix, training=False)
            return taken

        return ways

    def test_on_the_cpu_nothing_changes(self, ways):
        cpu = torch.device("cpu")
        assert dispatch.triton_problem(cpu) == "is for GPUs"
        assert ways(torch.float64, cpu) == ["stacked"]
        assert "triton" not in ways(torch.float32, cpu)

    @pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
    def test_on_a_gpu_but_for_float64(self, ways):
        assert dispatch.triton_problem(DEVICE) == ""
        assert ways(torch.float32, DEVICE)[0] == "triton"
        assert ways(torch.bfloat16, DEVICE)[0] == "triton"
        assert ways(torch.float64, DEVICE) == ["stacked"]


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from loradeck.ops import gpu as kernels

kinds = {"x": "*bf16", "a": "*bf16", "b": "*bf16", "z": "*bf16", "h": "*fp32", "weight": "*fp32",
         "item": "*i64", "slot": "*i64", "first": "*i64"}
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


@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
def test_it_compiles_for_gpus_that_are_not_here(tmp_path: Path):
    """To machine code of an A100 and an H100: the interpreter takes more than the compiler does."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "compiled", done.stderr
