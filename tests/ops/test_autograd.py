"""The one node of a linear layer: its gradients by number and by autograd, and what it keeps."""

import pytest
import torch
from torch import Tensor

from loradeck.ops import autograd, dispatch, portable
from loradeck.ops.dropout import Dropout
from loradeck.ops.layer_kinds import LinearForm
from loradeck.ops.mapping import Entry, Mix
from loradeck.ops.operands import Operands
from loradeck.ops.weights import Pair

FORM = LinearForm(5, 4)
ONE, TWO = ((0, 1.0),), ((1, -0.5),)
# entries of eight tokens in two rows of four, and the length of each
MIXES: dict[str, tuple[tuple[Entry, ...], tuple[int, ...]]] = {
    "one job": ((ONE,), (8,)),
    "a span to each job": ((ONE, TWO), (3, 5)),
    "in turns": ((ONE, TWO, ONE, (), TWO), (1, 2, 2, 1, 2)),
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


def operands(a0: Tensor, b0: Tensor, a1: Tensor, b1: Tensor, dropouts=(None, None)) -> Operands:
    return Operands(FORM, (Pair(a0, b0, 2.0, dropouts[0], "here"), Pair(a1, b1, 0.5, dropouts[1], "here")))


@pytest.mark.parametrize("dropouts", DROPOUTS.values(), ids=DROPOUTS)
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
class TestGradients:
    """Every mix, with and without dropout."""

    def test_numerical(self, mix, dropouts):
        def run(x, y, *pairs):
            return autograd.lora(x, y, operands(*pairs, dropouts=dropouts), Mix(*mix), training=True)

        assert torch.autograd.gradcheck(run, leaves())
        assert torch.autograd.gradgradcheck(run, leaves())

    def test_the_plain_way_of_autograd(self, mix, dropouts):
        found = []
        for lora in (autograd.lora, portable.lora):
            own = leaves()
            y = lora(own[0], own[1], operands(*own[2:], dropouts=dropouts), Mix(*mix), training=True)
            found.append((y, *torch.autograd.grad(y.square().sum(), own, materialize_grads=True)))
        for got, wanted in zip(*found, strict=True):
            assert torch.allclose(got, wanted, rtol=1e-10)


def test_the_backward_knows_the_mask_and_the_scale():
    """By the book, with nothing of ours but the mask. (mLoRA's fused backward leaves both out.)"""
    dropout = Dropout(0.5, seed=3)
    x, y, a, b, *_ = leaves()
    keep = dropout.keep((8, 5), "here", x.device).view(2, 4, 5)
    wanted = y + 2.0 * (x * keep / (1 - 0.5)) @ a.T @ b.T
    got = autograd.lora(x, y, operands(a, b, a, b, (dropout, None)), Mix((ONE,), (8,)), training=True)
    assert torch.allclose(got, wanted, rtol=1e-12)
    for mine, its in zip(
        *(torch.autograd.grad(out.square().sum(), (x, y, a, b)) for out in (got, wanted)), strict=True
    ):
        assert torch.allclose(mine, its, rtol=1e-12)


@pytest.mark.parametrize("asking", [[0], [2], [3], [2, 3], [3, 4], [1], [0, 5], [2, 3, 4, 5]], ids=str)
@pytest.mark.parametrize("mix", [MIXES["a span to each job"], MIXES["blended"]], ids=["spans", "blended"])
def test_who_asks_for_a_gradient_gets_it_and_nobody_else(asking, mix):
    """A first layer's input asks for none, nor does a frozen neighbour, or the half that does not train."""
    everyone = leaves()
    out = autograd.lora(*everyone[:2], operands(*everyone[2:]), Mix(*mix))
    wanted = torch.autograd.grad(out.square().sum(), everyone)
    own = [leaf.detach().requires_grad_(i in asking) for i, leaf in enumerate(everyone)]
    autograd.lora(*own[:2], operands(*own[2:]), Mix(*mix)).square().sum().backward()
    for i, leaf in enumerate(own):
        assert (leaf.grad is not None) == (i in asking)
        assert leaf.grad is None or torch.allclose(leaf.grad, wanted[i], rtol=1e-12)


def kept(run) -> dict[int, int]:
    """Bytes that autograd keeps, by the address of their storage."""
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
@pytest.mark.parametrize("name", ["a span to each job", "in turns"])
def test_what_it_keeps(name, dropouts):
    """x as it came, h (T, r) and one byte of mask per element: no copy of an activation, no float mask."""
    own, (entries, lengths) = leaves(torch.float32), MIXES[name]
    found = kept(
        lambda: autograd.lora(*own[:2], operands(*own[2:], dropouts=dropouts), Mix(entries, lengths), training=True)
    )
    given = {leaf.untyped_storage().data_ptr() for leaf in own}
    assert own[0].untyped_storage().data_ptr() in found
    tokens = [sum(n for entry, n in zip(entries, lengths, strict=True) if entry == job) for job in (ONE, TWO)]
    h = 4 * (2 * tokens[0] + 3 * tokens[1])
    masks = 5 * sum(tokens) if dropouts[0] else 0
    assert sum(size for where, size in found.items() if where not in given) == h + masks


def test_frozen_adapters_keep_no_activation():
    x, y, *pairs = leaves(torch.float32)
    parts = operands(*(pair.detach() for pair in pairs))
    found = kept(lambda: autograd.lora(x, y, parts, Mix((ONE,), (8,))))
    assert x.untyped_storage().data_ptr() not in found


def test_nothing_is_written_to():
    own = leaves()
    before = [leaf.detach().clone() for leaf in own]
    out = autograd.lora(
        *own[:2], operands(*own[2:], dropouts=DROPOUTS["dropped"]), Mix(*MIXES["in turns"]), training=True
    )
    first, second = (torch.autograd.grad(out.square().sum(), own, retain_graph=True) for _ in range(2))
    assert all(torch.equal(leaf, copy) for leaf, copy in zip(own, before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_tokens_of_the_base_alone_are_the_bases_own():
    x, y, *pairs = leaves()
    assert autograd.lora(x, y, operands(*pairs), Mix(((),), (8,))) is y


def test_inputs_that_lie_otherwise_in_memory():
    x, y, *pairs = leaves()
    wanted = autograd.lora(x, y, operands(*pairs), Mix(*MIXES["in turns"]))
    got = autograd.lora(x.mT.contiguous().mT, y.mT.contiguous().mT, operands(*pairs), Mix(*MIXES["in turns"]))
    assert torch.allclose(got, wanted, rtol=1e-12)
    grads = [torch.autograd.grad(out.sum(), (x, *pairs)) for out in (got, wanted)]  # a gradient of stride 0, too
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("native", [False, True], ids=["emulated", "native"])
def test_a_half_precision_layer_trains_float32_adapters(native, monkeypatch):
    if native:  # as on a device that computes in bfloat16
        monkeypatch.setattr(autograd, "compute_dtype", lambda *_: torch.bfloat16)
    own = leaves(torch.float32)
    mix, dropouts = Mix(*MIXES["in turns"]), DROPOUTS["dropped"]
    wanted = torch.autograd.grad(
        autograd.lora(*own[:2], operands(*own[2:], dropouts=dropouts), mix, training=True).sum(), own
    )
    x, y = (leaf.detach().bfloat16().requires_grad_() for leaf in own[:2])
    out = autograd.lora(x, y, operands(*own[2:], dropouts=dropouts), mix, training=True)
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
                own[0], layer(own[0]), operands(*own[2:]), Mix(*MIXES["a span to each job"]), training=True
            )
            grads.append(torch.autograd.grad(out.float().sum(), own[2:]))  # the backward pass inside of it, too
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True))
