"""The implementations of the update agree with its definition: every batch, every kind of layer, every dtype."""

import pytest
import torch
from torch import Tensor

from loradeck.ops import autograd, cpu, dispatch, portable, reference
from loradeck.ops.layer_kinds import LinearKind
from loradeck.ops.mapping import LoraMapping
from loradeck.ops.weights import LayerAdapters, LoraWeights

from .conftest import of_mapping

IMPLEMENTATIONS = {
    "reference": reference.lora,
    "portable": of_mapping(portable.lora),
    "dispatch": lambda *args: dispatch.lora(*args, training=False),
}


def implementations(adapters):
    """The C code is for linear layers."""
    linear = isinstance(adapters.kind, LinearKind) and cpu.why_not_available() is None
    return [*IMPLEMENTATIONS.values(), *([of_mapping(cpu.lora)] if linear else [])]


TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float64: 1e-12}


def close(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Equal up to rounding, measured against the size of the values: the sums here are of that many terms."""
    assert got.shape == wanted.shape
    assert (got.double() - wanted).abs().max() <= tolerance * max(1.0, wanted.abs().max().item())


@pytest.mark.slow
def test_every_implementation_is_the_definition(make, kind, entries):
    """In float32 and bfloat16; rows of the base alone are the base's bit for bit."""
    mapping = LoraMapping(entries, (1,) * len(entries))
    for dtype in (torch.float32, torch.bfloat16):
        case = make(kind, dtype=dtype)
        wanted = torch.stack([case.defined(row, entry) for row, entry in enumerate(entries)])
        base = torch.tensor([not entry for entry in entries])
        for lora in implementations(case.adapters):
            with torch.no_grad():
                got = lora(case.x, case.y.clone(), case.adapters, mapping)
            assert got.dtype == dtype
            assert torch.equal(got[base], case.y[base])
            close(got, wanted, TOLERANCE[dtype])


def test_under_autograd_the_base_output_is_left_alone(make, kind, entries):
    """What autograd saved of it must stay; the reference never writes to it at all."""
    case = make(kind, trains=True)
    y = case.y.clone()
    mapping = LoraMapping(entries, (1,) * len(entries))
    with torch.no_grad():
        wanted = reference.lora(case.x, y, case.adapters, mapping)
    for lora in (
        of_mapping(portable.lora),
        *([of_mapping(autograd.lora)] if isinstance(case.adapters.kind, LinearKind) else []),
    ):
        close(lora(case.x, y, case.adapters, mapping), wanted, 1e-5)
        assert torch.equal(y, case.y)


def test_adapters_of_another_dtype_than_their_layer(make, kind):
    """A float32 adapter on a bfloat16 base computes in the base's dtype and keeps its own."""
    case = make(kind, dtype=torch.bfloat16)
    wide = make(kind, dtype=torch.float32).adapters
    mapping = LoraMapping((((0, 1.0),), ((5, 0.5),), (), ((2, 1.0),)), (1,) * 4)
    wanted = reference.lora(case.x[:4], case.y[:4], case.adapters, mapping).double()
    for lora in implementations(case.adapters):
        with torch.no_grad():
            got = lora(case.x[:4], case.y[:4].clone(), wide, mapping)
        assert got.dtype == torch.bfloat16
        close(got, wanted, TOLERANCE[torch.bfloat16])
    assert all(pair.a.dtype == torch.float32 for pair in wide.weights)


def test_half_precision_adapters_on_a_float32_layer(make, kind):
    """Their values are what was stored, and nothing is rounded to it again, whatever the scaling is."""
    case = make(kind)
    weights = [each for each in case.adapters.weights if each]
    narrow = tuple(LoraWeights(each.a.bfloat16(), each.b.bfloat16(), 0.7 * each.scaling) for each in weights)
    case.adapters = LayerAdapters(case.adapters.kind, narrow)
    entries = (((0, 1.0),), ((5, 0.5),), (), ((2, 1.0), (1, -0.3)))
    wanted = torch.stack([case.defined(row, entry) for row, entry in enumerate(entries)])
    for lora in implementations(case.adapters):
        with torch.no_grad():
            got = lora(case.x[:4], case.y[:4].clone(), case.adapters, LoraMapping(entries, (1,) * 4))
        close(got, wanted, TOLERANCE[torch.float32])


@pytest.mark.parametrize("lengths", [(2, 3, 1, 2), (1, 1, 1, 5), (8,)])
@pytest.mark.parametrize("kind", ["linear", "embedding", "transformers' Conv1D"])
def test_packed_rows(make, kind, lengths):
    """`lengths` counts tokens of one packed row: each segment goes through its own entry."""
    case = make(kind)
    own = ((((0, 1.0),), (), ((5, 0.5), (2, -1.0)), ((0, 1.0),)))[: len(lengths)]
    x, y = case.x, case.y
    if kind == "embedding" or x.dim() == 3:
        case.x, case.y = x, y = x[:, 0], y[:, 0]
    tokens = [entry for entry, length in zip(own, lengths, strict=True) for _ in range(length)]
    wanted = torch.stack([case.defined(row, entry) for row, entry in enumerate(tokens)])
    for lora in implementations(case.adapters):
        with torch.no_grad():
            got = lora(x[None], y[None].clone(), case.adapters, LoraMapping(own, lengths))
        close(got[0], wanted, 1e-5)


def test_rows_multiplied(make, kind):
    """A batch of 8 rows under a mix of 4 entries: each entry has two rows in a row, as beams have."""
    case = make(kind)
    own = (((4, 1.0),), (), ((1, 0.5), (3, -2.0)), ((4, 1.0),))
    wanted = torch.stack([case.defined(row, own[row // 2]) for row in range(8)])
    for lora in implementations(case.adapters):
        with torch.no_grad():
            close(lora(case.x, case.y.clone(), case.adapters, LoraMapping(own, (1,) * 4)), wanted, 1e-5)


def test_an_adapter_that_leaves_the_layer_alone(make, kind):
    case = make(kind)
    entries = tuple(((i % 5, 1.0), (i % 3, -0.5)) if i % 4 else () for i in range(8))
    weights = tuple(None if i % 2 else each for i, each in enumerate(case.adapters.weights))
    case.adapters = LayerAdapters(case.adapters.kind, weights)
    wanted = torch.stack([case.defined(row, entry) for row, entry in enumerate(entries)])
    for lora in implementations(case.adapters):
        with torch.no_grad():
            got = lora(case.x, case.y.clone(), case.adapters, LoraMapping(entries, (1,) * len(entries)))
        close(got, wanted, 1e-5)


def test_scaled_embeddings_scale_the_update():
    """Gemma multiplies its embeddings by a constant; PEFT scales the update by it too."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    from loradeck.ops.layer_kinds import kind_of

    layer = Gemma3TextScaledWordEmbedding(11, 6, 0, embed_scale=3.0)
    a, b = torch.randn(2, 11), torch.randn(6, 2)
    ids = torch.randint(11, (4, 5))
    mapping = LoraMapping((((0, 1.0),), ()), (1, 1))
    wanted = layer(ids).detach().clone()
    wanted[:2] += 3.0 * 0.5 * (a.T[ids[:2]] @ b.T)
    for lora in IMPLEMENTATIONS.values():
        with torch.no_grad():
            got = lora(ids, layer(ids), LayerAdapters(kind_of(layer), (LoraWeights(a, b, 0.5),)), mapping)
        close(got, wanted.double(), 1e-5)
