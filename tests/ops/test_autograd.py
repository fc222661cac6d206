"""A linear layer's autograd node: numerical gradients, agreement with plain autograd, and what it saves."""

import pytest
import torch
from torch import Tensor

from loradeck.ops import autograd, dispatch, portable
from loradeck.ops.dropout import Dropout
from loradeck.ops.layer_kinds import LinearKind
from loradeck.ops.mapping import AdapterWeights, LoraMapping
from loradeck.ops.weights import LayerAdapters, LoraWeights

from .conftest import of_mapping

KIND = LinearKind(5, 4)
update = of_mapping(autograd.lora)
ONE, TWO = ((0, 1.0),), ((1, -0.5),)
# entries of eight tokens in two rows of four, and the length of each
BATCHES: dict[str, tuple[tuple[AdapterWeights, ...], tuple[int, ...]]] = {
    "one job": ((ONE,), (8,)),
    "a run for each job": ((ONE, TWO), (3, 5)),
    "alternating": ((ONE, TWO, ONE, (), TWO), (1, 2, 2, 1, 2)),
    "blended": ((((0, 0.5), (1, 2.0)), (), ((0, 0.5), (1, 2.0)), ONE), (2, 2, 2, 2)),
    "one adapter twice": ((((0, 0.5), (0, 0.25)), TWO), (4, 4)),
    "tokens of the base": (((), ONE, ()), (2, 3, 3)),
}
DROPOUTS = {"": (None, None), "dropped": (Dropout(0.4, seed=1), Dropout(0.7, seed=2))}


def leaves(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x (2, 4, 5), y (2, 4, 4) and two pairs of different rank."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 5), (2, 4, 4), (2, 5), (4, 2), (3, 5), (4, 3))
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def adapters(a0: Tensor, b0: Tensor, a1: Tensor, b1: Tensor, dropouts=(None, None)) -> LayerAdapters:
    return LayerAdapters(
        KIND, (LoraWeights(a0, b0, 2.0, dropouts[0], "here"), LoraWeights(a1, b1, 0.5, dropouts[1], "here"))
    )


@pytest.mark.parametrize("dropouts", DROPOUTS.values(), ids=DROPOUTS)
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
class TestGradients:
    """Every batch, with and without dropout."""

    @pytest.mark.slow
    def test_numerical(self, batch, dropouts):
        def run(x, y, *pairs):
            return update(x, y, adapters(*pairs, dropouts=dropouts), LoraMapping(*batch), training=True)

        assert torch.autograd.gradcheck(run, leaves())
        assert torch.autograd.gradgradcheck(run, leaves())

    def test_plain_autograd(self, batch, dropouts):
        found = []
        for lora in (update, of_mapping(portable.lora)):
            own = leaves()
            y = lora(own[0], own[1], adapters(*own[2:], dropouts=dropouts), LoraMapping(*batch), training=True)
            found.append((y, *torch.autograd.grad(y.square().sum(), own, materialize_grads=True)))
        for got, wanted in zip(*found, strict=True):
            assert torch.allclose(got, wanted, rtol=1e-10)


def test_the_backward_applies_the_mask_and_the_scale():
    """Computed without loradeck, but for the mask. (mLoRA's fused backward leaves both out.)"""
    dropout = Dropout(0.5, seed=3)
    x, y, a, b, *_ = leaves()
    keep = dropout.keep((8, 5), "here", x.device).view(2, 4, 5)
    wanted = y + 2.0 * (x * keep / (1 - 0.5)) @ a.T @ b.T
    got = update(x, y, adapters(a, b, a, b, (dropout, None)), LoraMapping((ONE,), (8,)), training=True)
    assert torch.allclose(got, wanted, rtol=1e-12)
    for mine, its in zip(
        *(torch.autograd.grad(out.square().sum(), (x, y, a, b)) for out in (got, wanted)), strict=True
    ):
        assert torch.allclose(mine, its, rtol=1e-12)


@pytest.mark.parametrize("asking", [[0], [2], [3], [2, 3], [3, 4], [1], [0, 5], [2, 3, 4, 5]], ids=str)
@pytest.mark.parametrize("batch", [BATCHES["a run for each job"], BATCHES["blended"]], ids=["spans", "blended"])
def test_only_tensors_that_require_a_gradient_get_one(asking, batch):
    """A first layer's input requires none, nor does a frozen neighbour, or a frozen half of a pair."""
    everyone = leaves()
    out = update(*everyone[:2], adapters(*everyone[2:]), LoraMapping(*batch))
    wanted = torch.autograd.grad(out.square().sum(), everyone)
    own = [leaf.detach().requires_grad_(i in asking) for i, leaf in enumerate(everyone)]
    update(*own[:2], adapters(*own[2:]), LoraMapping(*batch)).square().sum().backward()
    for i, leaf in enumerate(own):
        assert (leaf.grad is not None) == (i in asking)
        assert leaf.grad is None or torch.allclose(leaf.grad, wanted[i], rtol=1e-12)


def saved(run) -> dict[int, int]:
    """Bytes that autograd saves, by the address of their storage."""
    found: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return found


@pytest.mark.parametrize("dropouts", DROPOUTS.values(), ids=DROPOUTS)
@pytest.mark.parametrize("name", ["a run for each job", "alternating"])
def test_what_it_saves(name, dropouts):
    """x as it came, h (T, r) and one byte of mask per element: no copy of an activation, no float mask."""
    own, (entries, lengths) = leaves(torch.float32), BATCHES[name]
    found = saved(
        lambda: update(*own[:2], adapters(*own[2:], dropouts=dropouts), LoraMapping(entries, lengths), training=True)
    )
    given = {leaf.untyped_storage().data_ptr() for leaf in own}
    assert own[0].untyped_storage().data_ptr() in found
    tokens = [sum(n for entry, n in zip(entries, lengths, strict=True) if entry == job) for job in (ONE, TWO)]
    h = 4 * (2 * tokens[0] + 3 * tokens[1])
    masks = 5 * sum(tokens) if dropouts[0] else 0
    assert sum(size for where, size in found.items() if where not in given) == h + masks


def test_frozen_adapters_save_no_activation():
    x, y, *pairs = leaves(torch.float32)
    parts = adapters(*(pair.detach() for pair in pairs))
    found = saved(lambda: update(x, y, parts, LoraMapping((ONE,), (8,))))
    assert x.untyped_storage().data_ptr() not in found


def test_nothing_is_written_to():
    own = leaves()
    before = [leaf.detach().clone() for leaf in own]
    out = update(
        *own[:2], adapters(*own[2:], dropouts=DROPOUTS["dropped"]), LoraMapping(*BATCHES["alternating"]), training=True
    )
    first, second = (torch.autograd.grad(out.square().sum(), own, retain_graph=True) for _ in range(2))
    assert all(torch.equal(leaf, copy) for leaf, copy in zip(own, before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_model_may_add_to_the_result_in_place():
    """Llama 4 adds the experts' output to its shared expert's."""
    x, y, *pairs = leaves()
    plain, changed = (update(x, y, adapters(*pairs), LoraMapping((ONE,), (8,))) for _ in range(2))
    changed.add_(1.0)
    assert torch.equal(changed, plain + 1.0)
    grads = [torch.autograd.grad(out.square().sum(), pairs[:2]) for out in (changed, plain + 1.0)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_tokens_of_the_base_are_returned_as_they_are():
    x, y, *pairs = leaves()
    assert update(x, y, adapters(*pairs), LoraMapping(((),), (8,))) is y


def test_inputs_with_other_strides():
    x, y, *pairs = leaves()
    wanted = update(x, y, adapters(*pairs), LoraMapping(*BATCHES["alternating"]))
    got = update(x.mT.contiguous().mT, y.mT.contiguous().mT, adapters(*pairs), LoraMapping(*BATCHES["alternating"]))
    assert torch.allclose(got, wanted, rtol=1e-12)
    grads = [torch.autograd.grad(out.sum(), (x, *pairs)) for out in (got, wanted)]  # a gradient of stride 0, too
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("native", [False, True], ids=["emulated", "native"])
def test_a_half_precision_layer_trains_float32_adapters(native, monkeypatch):
    if native:  # as on a device that computes in bfloat16
        monkeypatch.setattr(autograd, "compute_dtype", lambda *_: torch.bfloat16)
    own = leaves(torch.float32)
    batch, dropouts = LoraMapping(*BATCHES["alternating"]), DROPOUTS["dropped"]
    wanted = torch.autograd.grad(
        update(*own[:2], adapters(*own[2:], dropouts=dropouts), batch, training=True).sum(), own
    )
    x, y = (leaf.detach().bfloat16().requires_grad_() for leaf in own[:2])
    out = update(x, y, adapters(*own[2:], dropouts=dropouts), batch, training=True)
    grads = torch.autograd.grad(out.sum(), (x, y, *own[2:]))
    assert out.dtype == torch.bfloat16
    assert [grad.dtype for grad in grads] == [torch.bfloat16] * 2 + [torch.float32] * 4
    assert all(torch.allclose(g.float(), w, atol=0.15, rtol=0.05) for g, w in zip(grads, wanted, strict=True))


def test_it_computes_in_its_own_dtype_under_autocast():
    layer = torch.nn.Linear(5, 4)
    own = leaves(torch.float32)
    grads = []
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = dispatch.lora(
                own[0], layer(own[0]), adapters(*own[2:]), LoraMapping(*BATCHES["a run for each job"]), training=True
            )
            grads.append(torch.autograd.grad(out.float().sum(), own[2:]))  # the backward pass inside of it, too
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True))
