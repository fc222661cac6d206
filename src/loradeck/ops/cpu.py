"""Rows of a batch, each through its own adapters, in C on a CPU (cpu.c). Knows linear layers only, outside autograd.

Nothing is stacked, cast or copied: the C code reads each pair where its adapter keeps it, at its own rank, so an
adapter that joins costs nothing, and a write to its tensors is seen at once. A row reads its own pairs and no other,
so a neighbour that is not finite stays where it is, whatever it is.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from loradeck.ops import compiler, reference
from loradeck.ops.layer_kinds import LinearForm
from loradeck.ops.mapping import Mix, Slot
from loradeck.ops.operands import Operands
from loradeck.ops.segments import Meetings, meetings
from loradeck.ops.weights import Pair

SOURCE = Path(__file__).with_suffix(".c")
CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16)
ARRAYS = ("item", "weight", "first", "unit_pair", "unit")  # of Meetings, as the C code's Batch has them


class _Pair(ctypes.Structure):
    _fields_ = (
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("r", ctypes.c_int64),
        ("half", ctypes.c_int64),
        ("scaling", ctypes.c_float),
    )


class _Batch(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("pairs", *ARRAYS)),
        *((name, ctypes.c_int64) for name in ("meetings", "met", "units", "inside", "outside", "ranks", "half")),
    )


@dataclass(frozen=True, eq=False)
class _Call:
    """What the C code is told besides x and y. Whoever holds it keeps all that it points to."""

    batch: _Batch
    meetings: Meetings
    dtype: torch.dtype
    held: tuple[object, ...]
    """The pairs at the addresses, and the array of these."""
    settled: bool
    """Whether the pairs stay there as long as the operands live: nothing was cast, and nothing is a parameter, whose
    memory can be exchanged without a trace."""
    version: int | None
    """Of the operands, for what was cast."""


_last: WeakKeyDictionary[Operands, _Call] = WeakKeyDictionary()  # the steps of a decode are alike


def takes(x: Tensor, y: Tensor) -> bool:
    """Say whether the C code computes the update of a linear layer of input x and output y, on this machine."""
    return (
        type(x) is type(y) is Tensor  # no subclass, behind which there may be no memory
        and x.device.type == y.device.type == "cpu"
        and x.dtype == y.dtype
        and x.dtype in DTYPES
        and not torch.compiler.is_compiling()
        and not problem()
    )


def plan(mix: Mix, slots: Sequence[Slot], unit: int) -> Meetings:
    """Return which items meet which pairs, and the groups that others compute at less cost; kept with the mix."""
    return mix.kept(_meetings, slots, unit, CPU)


def lora(x: Tensor, y: Tensor, operands: Operands, mix: Mix, own: Meetings | None = None) -> Tensor:
    """y[t] += Σ_a w_a · scaling_a · B_a (A_a x[t]), with sums in float32; the groups of the plan are left to others.

    x the layer's input · y the base's output for it, which is updated, both float32 or bfloat16 -> y.
    """
    x, y = x.contiguous(), y.contiguous()
    call = _call(operands, own or plan(mix, operands.slots, operands.form.count(x) // mix.total), y.dtype)
    # The interpreter is free for other threads meanwhile, which may put another call in the place of this one.
    if call.batch.meetings and _library().lora(
        ctypes.byref(call.batch), x.data_ptr(), y.data_ptr(), torch.get_num_threads()
    ):
        raise MemoryError("no memory for the update of a layer; give it fewer rows or tokens at once")
    return y


@cache
def problem() -> str:
    """Try the C code, compiled now or before, against the definition; return why not to use it, "" if nothing is."""
    chance = torch.Generator().manual_seed(0)
    x, y, a, b = (torch.randn(shape, generator=chance) for shape in ((7, 50), (7, 110), (12, 50), (110, 12)))
    pairs = [Pair(a[:r].clone(), b[:, -r:].clone(), 0.2) for r in (3, 4, 8, 12)]
    mix = Mix((((0, 1.0),), ((1, 1.0),), ((2, 1.0),), ((3, 1.0),), (), ((1, -0.5), (3, 2.0)), ((3, 1.0),)), (1,) * 7)
    try:
        with torch.no_grad():
            for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2**-7)):
                own = Operands(LinearForm(50, 110), tuple(replace(p, a=p.a.to(dtype), b=p.b.to(dtype)) for p in pairs))
                expected = reference.lora(x.to(dtype), y.to(dtype), own, mix)
                found = lora(x.to(dtype), y.to(dtype), own, mix)
                off = float((found - expected).abs().max() / expected.abs().max())
                if not off <= tolerance:
                    return f"is off by {off:.1e} here"
    except Exception as error:  # a compiler that is missing, or refuses this machine, says so in no common way
        return f"is not to be had here ({str(error).partition(chr(10))[0][:100] or type(error).__name__})"
    return ""


@cache
def _library() -> ctypes.CDLL:
    library = compiler.loaded(SOURCE)
    library.lora.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int)
    library.rows_of_a_unit.restype = ctypes.c_int64
    return library


def _meetings(mix: Mix, slots: Sequence[Slot], unit: int, _: torch.device) -> Meetings:
    return meetings(mix, slots, unit, _library().rows_of_a_unit())


def _call(operands: Operands, own: Meetings, dtype: torch.dtype) -> _Call:
    last = _last.get(operands)
    if last is not None and last.meetings is own and last.dtype == dtype and _stands(last, operands):
        return last
    pairs = [operands.pairs[operand] for operand in own.operands]
    held = [pair and _readable(operands, operand, pair) for operand, pair in zip(own.operands, pairs, strict=True)]
    views = all(t._base is not None for pair in pairs if pair for t in (pair.a, pair.b))
    lying = (_Pair * len(held))(
        *(
            _Pair(pair.a.data_ptr(), pair.b.data_ptr(), pair.r, pair.a.dtype == torch.bfloat16, pair.scaling)
            if pair
            else _Pair()
            for pair in held
        )
    )
    (_, inside), (outside, _) = operands.form.shapes(1)
    ranks = max((pair.r for pair in held if pair), default=0)
    sizes = (len(own.item) if ranks else 0, len(held), len(own.unit_pair), inside, outside, ranks)
    arrays = [getattr(own, name).data_ptr() for name in ARRAYS]
    batch = _Batch(ctypes.addressof(lying), *arrays, *sizes, dtype == torch.bfloat16)
    settled = views and all(new is old for new, old in zip(held, pairs, strict=True))
    version = operands.version if views and not settled else None
    made = _last[operands] = _Call(batch, own, dtype, (lying, *held), settled, version)
    return made


def _stands(call: _Call, operands: Operands) -> bool:
    """Say whether the pairs are still those, and where they were."""
    return call.settled or (call.version is not None and call.version == operands.version)


def _readable(operands: Operands, operand: int, pair: Pair) -> Pair:
    """Return a pair as the C code reads it: itself, or what was cast or closed up."""
    if pair.a.dtype == pair.b.dtype in DTYPES and pair.a.is_contiguous() and pair.b.is_contiguous():
        return pair
    if pair.a.dtype not in DTYPES or pair.a.dtype != pair.b.dtype:
        pair = operands.pair(operand, torch.float32) or pair
        pair = replace(pair, b=pair.b.float())
    return replace(pair, a=pair.a.contiguous(), b=pair.b.contiguous())
