"""The ways of the one operation agree with its definition: every mix, every kind of layer, every dtype."""

import pytest
import torch
from torch import Tensor

from loradeck.ops import autograd, cpu, dispatch, packed, portable, reference, stacked
from loradeck.ops import plan as planning
from loradeck.ops.layer_kinds import LinearForm
from loradeck.ops.mapping import Mix
from loradeck.ops.operands import Operands
from loradeck.ops.weights import Pair

WAYS = {
    "reference": reference.lora,
    "segmented": portable.lora,
    "choose": lambda *args: dispatch.lora(*args, training=False),
}


def ways(operands):
    """Stacks, packs and C are for linear layers."""
    linear = [every_row_stacked, packed.lora, *([] if cpu.problem() else [cpu.lora])]
    return [*WAYS.values(), *(linear if isinstance(operands.form, LinearForm) else [])]


def every_row_stacked(x, y, operands, mix):
    """All groups in stacks, whatever is cheaper."""
    plan = _plan(mix, operands.slots, x.numel() // x.shape[-1] // mix.total)
    return stacked.lora(x, y, operands, mix, plan)


def _plan(mix, slots, unit):
    own = Mix(mix.entries, mix.lengths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "SEGMENT", 1e9)
        return planning.plan_of(own, slots, unit, torch.device("cpu"))


TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float64: 1e-12}


def close(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Equal up to rounding, measured against the size of the values: the sums here are of that many terms."""
    assert got.shape == wanted.shape
    assert (got.double() - wanted).abs().max() <= tolerance * max(1.0, wanted.abs().max().item())


def test_every_way_is_the_definition(make, kind, entries):
    """In float32 and bfloat16; rows of the base alone are the base's bit for bit."""
    mix = Mix(entries, (1,) * len(entries))
    for dtype in (torch.float32, torch.bfloat16):
        case = make(kind, dtype=dtype)
        wanted = torch.stack([case.defined(row, entry) for row, entry in enumerate(entries)])
        base = torch.tensor([not entry for entry in entries])
        for lora in ways(case.operands):
            with torch.no_grad():
                got = lora(case.x, case.y.clone(), case.operands, mix)
            assert got.dtype == dtype
            assert torch.equal(got[base], case.y[base])
            close(got, wanted, TOLERANCE[dtype])


def test_under_autograd_the_base_output_is_left_alone(make, kind, entries):
    """What autograd saved of it must stay; the reference never writes to it at all."""
    case = make(kind, trains=True)
    y = case.y.clone()
    mix = Mix(entries, (1,) * len(entries))
    with torch.no_grad():
        wanted = reference.lora(case.x, y, case.operands, mix)
    for lora in (portable.lora, *([autograd.lora] if isinstance(case.operands.form, LinearForm) else [])):
        close(lora(case.x, y, case.operands, mix), wanted, 1e-5)
        assert torch.equal(y, case.y)


def test_adapters_of_another_dtype_than_their_layer(make, kind):
    """A float32 adapter on a bfloat16 base computes in the base's dtype and keeps its own."""
    case = make(kind, dtype=torch.bfloat16)
    wide = make(kind, dtype=torch.float32).operands
    mix = Mix((((0, 1.0),), ((5, 0.5),), (), ((2, 1.0),)), (1,) * 4)
    wanted = reference.lora(case.x[:4], case.y[:4], case.operands, mix).double()
    for lora in ways(case.operands):
        with torch.no_grad():
            got = lora(case.x[:4], case.y[:4].clone(), wide, mix)
        assert got.dtype == torch.bfloat16
        close(got, wanted, TOLERANCE[torch.bfloat16])
    assert all(pair.a.dtype == torch.float32 for pair in wide.pairs)


def test_half_precision_adapters_on_a_float32_layer(make, kind):
    """Their values are what was stored, and nothing is rounded to it again, whatever the scaling is."""
    case = make(kind)
    pairs = [pair for pair in case.operands.pairs if pair]
    narrow = tuple(Pair(pair.a.bfloat16(), pair.b.bfloat16(), 0.7 * pair.scaling) for pair in pairs)
    case.operands = Operands(case.operands.form, narrow)
    entries = (((0, 1.0),), ((5, 0.5),), (), ((2, 1.0), (1, -0.3)))
    wanted = torch.stack([case.defined(row, entry) for row, entry in enumerate(entries)])
    for lora in ways(case.operands):
        with torch.no_grad():
            got = lora(case.x[:4], case.y[:4].clone(), case.operands, Mix(entries, (1,) * 4))
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
    for lora in ways(case.operands):
        with torch.no_grad():
            got = lora(x[None], y[None].clone(), case.operands, Mix(own, lengths))
        close(got[0], wanted, 1e-5)


def test_rows_multiplied(make, kind):
    """A batch of 8 rows under a mix of 4 entries: each entry has two rows in a row, as beams have."""
    case = make(kind)
    own = (((4, 1.0),), (), ((1, 0.5), (3, -2.0)), ((4, 1.0),))
    wanted = torch.stack([case.defined(row, own[row // 2]) for row in range(8)])
    for lora in ways(case.operands):
        with torch.no_grad():
            close(lora(case.x, case.y.clone(), case.operands, Mix(own, (1,) * 4)), wanted, 1e-5)


def test_an_adapter_that_leaves_the_layer_alone(make, kind):
    case = make(kind)
    entries = tuple(((i % 5, 1.0), (i % 3, -0.5)) if i % 4 else () for i in range(8))
    case.operands.pairs = tuple(None if i % 2 else pair for i, pair in enumerate(case.operands.pairs))
    wanted = torch.stack([case.defined(row, entry) for row, entry in enumerate(entries)])
    for lora in ways(case.operands):
        with torch.no_grad():
            got = lora(case.x, case.y.clone(), case.operands, Mix(entries, (1,) * len(entries)))
        close(got, wanted, 1e-5)


def test_scaled_embeddings_scale_the_update():
    """Gemma multiplies its embeddings by a constant; PEFT scales the update by it too."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    from loradeck.ops.layer_kinds import form_of

    layer = Gemma3TextScaledWordEmbedding(11, 6, 0, embed_scale=3.0)
    a, b = torch.randn(2, 11), torch.randn(6, 2)
    ids = torch.randint(11, (4, 5))
    mix = Mix((((0, 1.0),), ()), (1, 1))
    wanted = layer(ids).detach().clone()
    wanted[:2] += 3.0 * 0.5 * (a.T[ids[:2]] @ b.T)
    for lora in WAYS.values():
        with torch.no_grad():
            got = lora(ids, layer(ids), Operands(form_of(layer), (Pair(a, b, 0.5),)), mix)
        close(got, wanted.double(), 1e-5)
