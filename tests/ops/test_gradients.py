"""Gradients agree with the definition's, and the definition's with numerical ones."""

from functools import partial

import pytest
import torch
from torch import nn

from loradeck.ops import autograd, dispatch, portable, reference
from loradeck.ops.dropout import Dropout
from loradeck.ops.layer_kinds import LinearKind, kind_of
from loradeck.ops.mapping import LoraMapping
from loradeck.ops.weights import LayerAdapters, LoraWeights

from .conftest import of_mapping

BATCHES = {
    "runs": (((0, 1.0),), ((0, 1.0),), (), ((1, 0.5),)),
    "alternating": (((0, 1.0),), ((1, -2.0),), ((0, 1.0),), ((1, -2.0),)),
    "blended": (((0, 0.5), (1, 1.5)), (), ((0, 0.5), (1, 1.5)), ((2, 1.0),)),
    "one for all": (((1, 0.5), (2, 0.25)),) * 4,
}


@pytest.mark.parametrize("mapping", BATCHES.values(), ids=BATCHES)
def test_the_fast_gradients_are_the_reference_gradients(make, kind, mapping):
    case = make(kind, count=4, dtype=torch.float64, trains=True)
    mapping = LoraMapping(mapping, (1,) * 4)
    x, leaves = case.x[:4], [t for pair in case.adapters.weights for t in (pair.a, pair.b)]
    if x.is_floating_point():
        x = x.clone().requires_grad_()
        leaves.append(x)
    y = case.y[:4].clone().requires_grad_()
    leaves.append(y)
    grads = []
    for lora in (
        reference.lora,
        of_mapping(portable.lora),
        *([of_mapping(autograd.lora)] if isinstance(case.adapters.kind, LinearKind) else []),
    ):
        out = lora(x, y, case.adapters, mapping)
        grads.append(
            torch.autograd.grad((out * torch.arange(out.numel()).view(out.shape)).sum(), leaves, allow_unused=True)
        )
    for fast in grads[1:]:
        for wanted, got in zip(grads[0], fast, strict=True):
            if wanted is None or not bool(wanted.any()):
                assert got is None or not bool(got.any())
            else:
                assert torch.allclose(got, wanted, rtol=1e-9, atol=1e-9)
        assert fast[6] is None or not bool(fast[6].any())  # operand 3 is in no mapping


def test_gradients_go_through_to_the_input(make):
    """Frozen adapters below a layer that trains."""
    for kind in ("linear of tokens", "conv2d in groups"):
        case = make(kind, dtype=torch.float64)
        mapping = LoraMapping(BATCHES["blended"], (1,) * 4)
        grads = []
        for lora in (reference.lora, partial(dispatch.lora, training=False)):
            x = case.x[:4].clone().requires_grad_()
            lora(x, case.y[:4], case.adapters, mapping).square().sum().backward()
            grads.append(x.grad)
        assert torch.allclose(*grads, rtol=1e-9)


@pytest.mark.parametrize("layer", [nn.Linear(3, 4), nn.Conv1d(2, 4, 2, groups=2)], ids=["linear", "conv"])
def test_numerical_gradients(layer):
    layer_kind = kind_of(layer.double())
    torch.manual_seed(0)
    leaves = []
    for r in (2, 4):
        leaves += [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in layer_kind.shapes(r)]
    x = torch.randn((4, 3) if isinstance(layer, nn.Linear) else (4, 2, 5), dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        y = layer(x)
    mapping = LoraMapping((((0, 1.0),), ((1, 0.5), (0, 2.0)), (), ((0, 1.0),)), (1,) * 4)

    def run(x, a0, b0, a1, b1):
        adapters = LayerAdapters(layer_kind, (LoraWeights(a0, b0, 0.5), LoraWeights(a1, b1, 3.0)))
        return dispatch.lora(x, y, adapters, mapping, training=False)

    assert torch.autograd.gradcheck(run, (x, *leaves))


def test_a_row_of_the_base_gives_no_gradient():
    layer_kind = kind_of(nn.Linear(3, 4))
    a, b = torch.randn(2, 3, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    x, y = torch.randn(3, 3), torch.zeros(3, 4)
    mapping = LoraMapping((((0, 1.0),), (), ((0, 1.0),)), (1,) * 3)
    dispatch.lora(x, y, LayerAdapters(layer_kind, (LoraWeights(a, b, 1.0),)), mapping, training=True).sum().backward()
    own = x[[0, 2]]
    assert torch.allclose(b.grad, (own @ a.detach().T).sum(0).expand(4, 2), atol=1e-6)


class TestDropout:
    """Each adapter's own mask, from its own generator, while training only."""

    def adapters(self, p: float, seed: int = 0) -> LayerAdapters:
        layer_kind = kind_of(nn.Linear(64, 4))
        torch.manual_seed(1)
        pairs = [
            LoraWeights(torch.randn(2, 64), torch.randn(4, 2), 1.0, Dropout(p, torch.Generator().manual_seed(seed + i)))
            for i in range(2)
        ]
        return LayerAdapters(layer_kind, tuple(pairs))

    def test_the_mask_of_one_does_not_depend_on_its_neighbours(self):
        x, y = torch.randn(4, 64), torch.zeros(4, 4)
        alone = dispatch.lora(
            x[:2], y[:2].clone(), self.adapters(0.5), LoraMapping((((0, 1.0),),) * 2, (1, 1)), training=True
        )
        mapping = LoraMapping((((0, 1.0),), ((0, 1.0),), ((1, 1.0),), ()), (1,) * 4)
        together = dispatch.lora(x, y.clone(), self.adapters(0.5), mapping, training=True)
        assert torch.allclose(together[:2], alone, atol=1e-5)
        again = dispatch.lora(x, y.clone(), self.adapters(0.5, seed=7), mapping, training=True)
        assert not torch.allclose(again[:2], alone, atol=1e-2)

    def test_it_keeps_the_mean_and_acts_only_in_training(self):
        x, y = torch.randn(1, 64), torch.zeros(1, 4)
        adapters, mapping = self.adapters(0.25), LoraMapping((((0, 1.0),),), (1,))
        quiet = dispatch.lora(x, y.clone(), adapters, mapping, training=False)
        assert torch.equal(quiet, reference.lora(x, y, adapters, mapping))
        noisy = torch.stack([dispatch.lora(x, y.clone(), adapters, mapping, training=True) for _ in range(400)])
        assert noisy.std(0).min() > 0.1
        assert torch.allclose(noisy.mean(0), quiet, atol=5 * float(noisy.std(0).max()) / 20)

    def test_the_ids_of_an_embedding_are_never_dropped(self):
        layer = nn.Embedding(5, 4)
        pair = LoraWeights(torch.randn(2, 5), torch.randn(4, 2), 1.0, Dropout(0.5))
        ids, adapters = torch.arange(4), LayerAdapters(kind_of(layer), (pair,))
        mapping = LoraMapping((((0, 1.0),),) * 4, (1,) * 4)
        with torch.no_grad():
            got = dispatch.lora(ids, layer(ids), adapters, mapping, training=True)
            assert torch.equal(got, dispatch.lora(ids, layer(ids), adapters, mapping, training=False))
