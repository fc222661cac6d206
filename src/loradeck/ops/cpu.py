"""The update of linear layers on a CPU, in C (cpu.c), outside autograd.

Nothing is stacked, cast or copied: the C code reads each adapter's weights where the adapter keeps them, at their own
rank, so a new adapter costs nothing, and a write to its tensors is seen at once. A token reads the weights of its own
adapters only, so a neighbour's NaN stays there.
"""

import ctypes
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from loradeck.ops import compiler, reference
from loradeck.ops.layer_kinds import LinearKind
from loradeck.ops.mapping import LoraMapping
from loradeck.ops.segments import Segments
from loradeck.ops.weights import LayerAdapters, LoraWeights

SOURCE = Path(__file__).with_suffix(".c")
DTYPES = (torch.float32, torch.bfloat16)

# Microseconds on two CPU cores, of a layer from 576 to 1536 features: `python -m benchmarks ops`, results/ops.*json;
# between those of float32 and of bfloat16.
TOKEN_RANK = 0.037  # a token at one rank, here
DENSE, DENSE_TOKEN, DENSE_TOKEN_RANK = 45.0, 0.2, 0.016  # two dense products of a segment


def takes(x: Tensor, y: Tensor) -> bool:
    """Whether the C code computes the update of a linear layer with input x and output y, on this machine."""
    return (
        type(x) is type(y) is Tensor  # a subclass may have no memory
        and x.device.type == y.device.type == "cpu"
        and x.dtype == y.dtype
        and x.dtype in DTYPES
        and not torch.compiler.is_compiling()
        and why_not_available() is None
    )


def is_long(tokens: int, r: int) -> bool:
    """Whether two dense products are faster for a segment than the C code."""
    return DENSE + tokens * (DENSE_TOKEN + DENSE_TOKEN_RANK * r) < tokens * TOKEN_RANK * r


def lora(x: Tensor, y: Tensor, adapters: LayerAdapters, segments: Segments) -> Tensor:
    """y[t] += Σ_a w_a · scaling_a · B_a (A_a x[t]), with sums in float32.

    x the layer's input · y the base's output for it, updated in place where it is contiguous, both float32 or
    bfloat16 -> y.

    Raises:
        MemoryError: y is unchanged.
    """
    x, y = x.contiguous(), y.contiguous()
    table, scaling, memory = adapters.addresses(segments)
    (_, inside), (outside, _) = adapters.kind.shapes(1)
    failed = _library().lora(
        ctypes.byref(segments.c_struct), table.data_ptr(), scaling.data_ptr(), x.data_ptr(), y.data_ptr(),
        inside, outside, y.dtype == torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip
    del memory  # the addresses were valid until here
    if failed:
        raise MemoryError("out of memory in the update of a layer; send fewer rows or tokens at once")
    return y


@cache
def why_not_available() -> str | None:
    """Compile the C code unless it is cached, and check it against the definition; None if it is usable."""
    entries = (((0, 1.0),), ((1, 1.0),), ((2, 1.0),), ((3, 1.0),), (), ((1, -0.5), (3, 2.0)), ((3, 1.0),))
    mapping = LoraMapping(entries, (1,) * 7)
    try:
        # The first call may be inside inference mode, whose tensors have no version counter.
        with torch.inference_mode(False), torch.no_grad():
            rng = torch.Generator().manual_seed(0)
            x, y, a, b = (torch.randn(shape, generator=rng) for shape in ((7, 50), (7, 110), (12, 50), (110, 12)))
            weights = [LoraWeights(a[:r].clone(), b[:, -r:].clone(), 0.2) for r in (3, 4, 8, 12)]
            for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2**-7)):
                cast = tuple(replace(each, a=each.a.to(dtype), b=each.b.to(dtype)) for each in weights)
                adapters = LayerAdapters(LinearKind(50, 110), cast)
                expected = reference.lora(x.to(dtype), y.to(dtype), adapters, mapping)
                result = lora(x.to(dtype), y.to(dtype), adapters, mapping.segments(1, x.device))
                error = float((result - expected).abs().max() / expected.abs().max())
                if not error <= tolerance:
                    return f"is off by {error:.1e} on this machine"
    except Exception as error:  # compilers that are missing, or refuse this machine, raise no common type
        return f"is unavailable ({str(error).partition(chr(10))[0][:100] or type(error).__name__})"
    return None


def origin() -> str:
    """Return where the library comes from, in words."""
    return compiler.origin(_library())


@cache
def _library() -> ctypes.CDLL:
    library = compiler.load(SOURCE)
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    library.lora.argtypes = (*(pointer,) * 5, size, size, ctypes.c_int, ctypes.c_int)
    return library
