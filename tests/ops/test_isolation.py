"""Nothing depends on the rest of the batch: a neighbour's NaN stays in its own rows."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from loradeck.ops import autograd, cpu, dispatch, portable, reference
from loradeck.ops.layer_kinds import LinearKind, kind_of
from loradeck.ops.mapping import LoraMapping
from loradeck.ops.weights import LayerAdapters, LoraWeights

from .conftest import of_mapping

# Two sound rows of adapters 0 and 2, a base row, and the broken adapter 1 between them; then two more of 0 and 1.
ENTRIES = (((0, 1.0),), ((1, 1.0),), (), ((2, 0.5), (0, 1.0)), ((0, 1.0),), ((1, 1.0), (2, 1.0)))
SOUND = [0, 2, 3, 4]


@pytest.fixture(autouse=True, params=["in C", "without a compiler"])
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the C code, and without."""
    if request.param == "without a compiler":
        monkeypatch.setattr(cpu, "takes", lambda x, y: False)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("half", ["a", "b"])
def test_a_broken_adapter_changes_no_other_row(make, kind, bad, half):
    case = make(kind, count=3)
    with torch.no_grad():
        wanted = torch.stack([case.defined(row, ENTRIES[row]) for row in SOUND])
        getattr(case.adapters.weights[1], half).fill_(bad)
        mapping = LoraMapping(ENTRIES, (1,) * 6)
        got = dispatch.lora(case.x[:6], case.y[:6].clone(), case.adapters, mapping, training=False)
    assert torch.allclose(got[SOUND].double(), wanted, atol=1e-5)
    assert torch.equal(got[2], case.y[2])
    assert not bool(torch.isfinite(got[1]).any())  # and it did run through the broken one


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_input_row_changes_no_other_row(make, bad):
    for kind in ("linear", "linear of tokens", "conv1d", "conv2d in groups"):
        case = make(kind, count=3)
        wanted = torch.stack([case.defined(row, ENTRIES[row]) for row in SOUND])
        case.x[[1, 5]] = bad
        for lora in (partial(dispatch.lora, training=False), of_mapping(portable.lora)):
            with torch.no_grad():
                got = lora(case.x[:6], case.y[:6].clone(), case.adapters, LoraMapping(ENTRIES, (1,) * 6))
            assert torch.allclose(got[SOUND].double(), wanted, atol=1e-5)
            assert not bool(torch.isfinite(got[1]).any())


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 0.5)], ids=["one factor", "many factors"])
def test_an_overflow_next_door_changes_no_other_row(weights):
    """Every tensor is finite; one adapter's product overflows to Inf for every row that meets it."""
    layer_kind = LinearKind(4, 3)
    sound = LoraWeights(torch.randn(2, 4), torch.randn(3, 2), 1.0)
    huge = LoraWeights(torch.full((2, 4), 3e38), torch.full((3, 2), 3e38), 1.0)
    adapters = LayerAdapters(layer_kind, (sound, huge))
    x, y = torch.rand(4, 4) + 1, torch.randn(4, 3)
    mapping = LoraMapping((((0, weights[0]),), ((1, weights[0]),), (), ((0, weights[1]),)), (1,) * 4)
    wanted = reference.lora(x, y, adapters, mapping)
    got = dispatch.lora(x, y.clone(), adapters, mapping, training=False)
    assert torch.allclose(got[[0, 2, 3]], wanted[[0, 2, 3]], atol=1e-5)
    assert not bool(torch.isfinite(got[1]).any())


@pytest.mark.parametrize("broken", ["nan in b", "overflow", "nan in x"])
def test_long_segments_change_no_other_row(broken):
    """As chunks of prompts have them: by dense products, beside short ones."""
    layer_kind, dtype = LinearKind(16, 12), torch.bfloat16
    weights = [LoraWeights(torch.randn(64, 16) / 4, torch.randn(12, 64) / 8, 2.0) for _ in range(3)]
    lengths = (200, 200, 1)
    x, y = torch.randn(1, 401, 16).to(dtype), torch.randn(1, 401, 12).to(dtype)
    if broken == "nan in b":
        weights[1].b[3, 1] = math.nan
    if broken == "overflow":
        weights[1].a.fill_(3e38)
        weights[1].b.fill_(3e38)
    if broken == "nan in x":
        x[:, 200:400] = math.nan
    adapters = LayerAdapters(layer_kind, tuple(weights))
    mapping = LoraMapping((((0, 1.0),), ((1, 1.0),), ((2, 0.5),)), lengths)
    with torch.no_grad():
        got = dispatch.lora(x, y.clone(), adapters, mapping, training=False)
        wanted = reference.lora(x, y, adapters, mapping)
    sound = [*range(200), 400]
    torch.testing.assert_close(got[:, sound], wanted[:, sound], atol=5e-2, rtol=2e-2)
    assert not bool(torch.isfinite(got[:, 200:400]).all())


@pytest.mark.parametrize("weight", [1e38, 1e39, 1e308, -1e308])
def test_a_weight_beyond_the_dtype_changes_no_other_row(weight):
    layer_kind = LinearKind(4, 3)
    adapters = LayerAdapters(layer_kind, (LoraWeights(torch.randn(2, 4), torch.randn(3, 2), 16.0),))
    x, y = torch.randn(3, 4), torch.randn(3, 3)
    for lora in (partial(dispatch.lora, training=False), of_mapping(portable.lora)):
        got = lora(x, y.clone(), adapters, LoraMapping((((0, weight),), (), ()), (1,) * 3))
        assert torch.equal(got[1:], y[1:])
        assert got[0].abs().max() > 1e30 or not bool(torch.isfinite(got[0]).all())


def test_a_cast_that_overflows_changes_no_other_row():
    """70 000 is finite in float32 and infinite in float16: what counts is what the layer computes with."""
    layer = nn.Linear(4, 3).half()
    sound = LoraWeights(torch.randn(2, 4), torch.randn(3, 2), 1.0)
    adapters = LayerAdapters(kind_of(layer), (sound, LoraWeights(torch.full((2, 4), 7e4), torch.randn(3, 2), 1.0)))
    x, y = torch.randn(3, 4).half(), torch.randn(3, 3).half()
    got = dispatch.lora(x, y.clone(), adapters, LoraMapping((((0, 1.0),), ((1, 1.0),), ()), (1,) * 3), training=False)
    alone = dispatch.lora(x[:1], y[:1].clone(), adapters, LoraMapping((((0, 1.0),),), (1,)), training=False)
    assert torch.allclose(got[:1], alone, atol=1e-2)
    assert torch.equal(got[2], y[2])


@pytest.mark.parametrize("lora", [of_mapping(portable.lora), of_mapping(autograd.lora)], ids=["portable", "autograd"])
@pytest.mark.parametrize("half", ["a", "b"])
def test_gradients_stay_at_home_when_a_neighbour_is_nan(make, lora, half):
    case = make("linear", count=3, trains=True)
    mapping = LoraMapping(ENTRIES, (1,) * 6)
    with torch.no_grad():
        wanted = lora(case.x[:6], case.y[:6].clone(), case.adapters, mapping)
        getattr(case.adapters.weights[1], half).fill_(math.nan)
    x = case.x[:6].clone().requires_grad_()
    y = lora(x, case.y[:6].clone(), case.adapters, mapping)
    assert torch.allclose(y[SOUND], wanted[SOUND])
    assert bool(y[[1, 5]].isnan().any(-1).all())
    y.sum().backward()
    for sound in (0, 2):
        pair = case.adapters.weights[sound]
        assert bool(torch.isfinite(pair.a.grad).all())
        assert bool(torch.isfinite(pair.b.grad).all())
    assert bool(torch.isfinite(x.grad[SOUND]).all())
