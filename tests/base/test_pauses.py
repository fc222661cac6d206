"""Pauses within a computation: where they are, and that they change nothing."""

import threading
from contextvars import Context

import pytest
import torch
from transformers import LlamaForCausalLM

from loradeck.base.pauses import pause, pauses
from loradeck.base.weights import prepare
from loradeck.errors import Interruption
from loradeck.train.mode import training

TOKENS = torch.arange(3, 15)[None]


def gradient(model: LlamaForCausalLM) -> torch.Tensor:
    """The gradient at the model's inputs; after it, the backward pass has gone through all layers."""
    inputs = model.get_input_embeddings()(TOKENS).detach().requires_grad_()
    logits = model(inputs_embeds=inputs, use_cache=False).logits
    logits.float().log_softmax(-1)[..., 5].sum().backward()
    assert inputs.grad is not None
    return inputs.grad


def leaves(model: LlamaForCausalLM) -> int:
    return sum(1 for module in model.modules() if not [*module.children()])


@pytest.mark.parametrize("weights", ["plain", "packed", "blocks", "int8", "int4"])
def test_they_come_between_all_modules_and_change_no_bit(tiny: LlamaForCausalLM, weights: str) -> None:
    prepare(tiny, weights)  # type: ignore[arg-type]
    alone = gradient(tiny)
    seen: list[bool] = []
    with pauses(tiny, lambda: seen.append(torch._C._current_graph_task_id() != -1)):
        paused = gradient(tiny)
    assert torch.equal(paused, alone)
    linear = sum(isinstance(module, torch.nn.Linear) for module in tiny.modules())
    assert seen.count(False) >= leaves(tiny)
    assert seen.count(True) >= linear
    assert not any(module._forward_hooks for module in tiny.modules())


def test_a_layer_that_is_computed_again_pauses_too(tiny: LlamaForCausalLM) -> None:
    alone = gradient(tiny)
    seen: list[bool] = []
    with (
        training(tiny, gradient_checkpointing=True),
        pauses(tiny, lambda: seen.append(torch._C._current_graph_task_id() != -1)),
    ):
        torch.testing.assert_close(gradient(tiny), alone)
    linear = sum(isinstance(module, torch.nn.Linear) for module in tiny.modules())
    assert seen.count(True) >= 2 * (linear - 1)  # the head is computed once


@pytest.mark.parametrize("at", [0, 3, 40, -1])
def test_an_interruption_leaves_the_model_usable(tiny: LlamaForCausalLM, at: int) -> None:
    alone = gradient(tiny)
    counts = [0]

    def count() -> None:
        counts[0] += 1

    with pauses(tiny, count):
        gradient(tiny)
    last, counts[0] = counts[0] + at if at < 0 else at, 0

    def interrupt() -> None:
        count()
        if counts[0] > last:
            raise Interruption

    with pytest.raises(Interruption), pauses(tiny, interrupt):
        gradient(tiny)
    assert counts[0] == last + 1
    assert torch.equal(gradient(tiny), alone)


def test_other_threads_and_contexts_have_none(tiny: LlamaForCausalLM) -> None:
    seen: list[None] = []
    pause()
    with pauses(tiny, lambda: seen.append(None)), torch.no_grad():
        Context().run(tiny, TOKENS)
        thread = threading.Thread(target=tiny, args=(TOKENS,))
        thread.start()
        thread.join()
        assert not seen
        pause()
        assert len(seen) == 1
    pause()
    assert len(seen) == 1
