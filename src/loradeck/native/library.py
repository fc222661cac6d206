"""The compiled step: its C structures, and the library for each way to compute."""

import ctypes
from ctypes import POINTER, Structure, c_double, c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch

from loradeck.dtypes import cpu_has
from loradeck.native.slots import SLOTS
from loradeck.ops import compiler

SOURCE = Path(__file__).with_name("step.c")
OPTIONS = "-O2 -ffp-contract=off"  # besides the compiler's own
BYTES = "-mavx512vnni"  # multiplies bytes by the CPU's own instruction
HALVES = f"-DHALVES -mavx512bf16 {BYTES}"  # CPUs that have the one have the other
_loaded: list[ctypes.CDLL] = []


class CMatrix(Structure):
    """A matrix in blocks."""

    _fields_ = (
        ("blocks", c_void_p),
        ("tiles", c_int64),
        ("groups", c_int64),
        ("format", c_int64),
        ("bias", c_void_p),
    )


class CExperts(Structure):
    """A mixture of experts, in place of a layer's MLP."""

    _fields_ = (
        ("router", CMatrix),
        ("matrices", POINTER(CMatrix)),
        ("count", c_int64),
        ("chosen", c_int64),
        ("normalised", c_int64),
    )


NORMS = ("attention_in", "attention_out", "mlp_in", "mlp_out", "query_norm", "key_norm")


class CLayer(Structure):
    """A layer."""

    _fields_ = (
        ("matrix", CMatrix * len(SLOTS)),
        *((name, c_void_p) for name in (*NORMS, "cos", "sin")),
        ("turned", c_int64),
        ("window", c_int64),
        ("norms_all", c_int64),
        ("experts", CExperts),
    )


class CModel(Structure):
    """A model."""

    _fields_ = (
        *(
            (name, c_int64)
            for name in (
                "layers", "hidden", "heads", "key_heads", "dim", "inter", "vocabulary", "true_hidden", "true_dim",
                "activation", "cache_format", "embedding_format", "rounds",
            )
        ),
        ("layer", POINTER(CLayer)),
        ("embedding", c_void_p),
        ("norm", c_void_p),
        ("lookup", CMatrix),
        ("head", CMatrix),
        ("eps", c_double),
        *(
            (name, c_float)
            for name in ("embedding_scale", "scale", "softcap", "residual_scale", "logit_scale", "logit_cap")
        ),
    )  # fmt: skip


class CPairing(Structure):
    """An adapter's A and B at one matrix."""

    _fields_ = (("r", c_int64), ("format", c_int64), ("a", c_void_p), ("b", c_void_p), ("scaling", c_float))


class CUse(Structure):
    """An adapter of a route, at a weight."""

    _fields_ = (("pairings", POINTER(CPairing)), ("weight", c_float))


class CRoute(Structure):
    """The adapters of a row."""

    _fields_ = (("uses", POINTER(CUse)), ("count", c_int64))


class CBatch(Structure):
    """The rows of a step."""

    _fields_ = (
        ("rows", c_int64),
        ("wanted", c_int64),
        *((name, c_void_p) for name in ("tokens", "positions", "sequences", "routes", "want", "pages")),
        ("route", POINTER(CRoute)),
        ("ranks", c_int64),
        ("logits", c_void_p),
    )


class CProduct(Structure):
    """A product of rows with a matrix."""

    _fields_ = (
        ("w", CMatrix),
        ("x", c_void_p),
        ("y", c_void_p),
        *((name, c_int64) for name in ("rows", "inputs", "outputs", "format")),
    )


class CPlain(Structure):
    """Tiles of a quantised matrix to decode."""

    _fields_ = (("w", CMatrix), ("y", c_void_p), ("tile", c_void_p), ("count", c_int64), ("format", c_int64))


class CLayout(Structure):
    """Blocks of a file to lay out in tiles."""

    _fields_ = (
        *((name, c_void_p) for name in ("blocks", "order", "tiles")),
        *((name, c_int64) for name in ("row_bytes", "outputs", "groups", "format", "count")),
    )


class CChoice(Structure):
    """A token to choose or to score, and its row of logits."""

    _fields_ = (
        ("logits", c_void_p),
        ("adjusted", c_void_p),
        *((name, c_double) for name in ("temperature", "top_p", "min_p", "u")),
        *((name, c_int64) for name in ("top_k", "scored", "tops", "token")),
        *((name, c_float) for name in ("largest", "best", "logprob")),
        ("top_logprobs", POINTER(c_float)),
        ("top_ids", POINTER(c_int64)),
    )


@cache
def library(options: str) -> ctypes.CDLL:
    """Return the step compiled with these options, besides `OPTIONS`.

    Raises:
        OSError: as `compiler.load`.
    """
    step = compiler.load(SOURCE, f"{OPTIONS} {options}")
    step.loradeck_step.argtypes = (POINTER(CModel), POINTER(CBatch), c_int)
    step.loradeck_product.argtypes = (POINTER(CProduct), c_int)
    step.loradeck_sample.argtypes = (POINTER(CChoice), c_int64, c_int64, c_int)
    step.loradeck_plain.argtypes = (POINTER(CPlain), c_int)
    step.loradeck_plain.restype = None
    step.loradeck_values.argtypes = (POINTER(CMatrix), c_void_p, c_int64, c_void_p)
    step.loradeck_values.restype = None
    step.loradeck_lay_out.argtypes = (POINTER(CLayout), c_int)
    step.loradeck_tile_bytes.argtypes = (c_int64, c_int64)
    step.loradeck_tile_bytes.restype = c_int64
    step.loradeck_page_bytes.argtypes = (POINTER(CModel),)
    step.loradeck_page_bytes.restype = c_int64
    _loaded.append(step)
    return step


def any_library() -> ctypes.CDLL:
    """Return a library for what each of them computes alike.

    Raises:
        OSError: as `library`.
    """
    return latest() or library(options_for(halves=multiplies_halves(torch.bfloat16)))


def options_for(*, halves: bool) -> str:
    """Return the options for this CPU. `halves`: multiply in bfloat16."""
    return HALVES if halves else BYTES if multiplies_bytes() else ""


def int8_pays(*, halves: bool) -> bool:
    """Whether int8 activations are the default on this CPU: where they were measured to be faster."""
    return not halves and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def multiplies_bytes() -> bool:
    """Whether the CPU has an instruction for products of bytes."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and cpu_has("avx512_vnni")


def multiplies_halves(dtype: torch.dtype) -> bool:
    """Whether products with weights of this dtype are computed in bfloat16, by the CPU's own instruction."""
    return (
        dtype == torch.bfloat16
        and torch.backends.cpu.get_cpu_capability() == "AVX512"  # a user may choose a lower one
        and cpu_has("avx512_bf16")
    )


def latest() -> ctypes.CDLL | None:
    """Return the library that was loaded last: for what each of them computes, in the step's own threads."""
    return _loaded[-1] if _loaded else None


def origin(options: str) -> str:
    """Return where the library of these options comes from, in words."""
    return compiler.origin(library(options))
