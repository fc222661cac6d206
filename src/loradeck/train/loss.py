"""-log p of the supervised tokens, example by example.

B examples   H hidden size   V vocabulary   N positions of the batch that predict a supervised token
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from loradeck.base.frozen import FrozenLinear
from loradeck.base.matmul import blocks, input_grad
from loradeck.base.pauses import pause
from loradeck.dataset.example import UNSUPERVISED, Example
from loradeck.train.batching import Batch, collate
from loradeck.train.packing import can_pack, packed_sequences

# Rows of the head at once: enough for a fast matrix product, few enough that (rows, V) stays small.
ROWS = 128
PART = 1 << 22  # weights of the head at once: as fast as all of them, with a pause after a few milliseconds


class Losses:
    """The losses of examples under one model, computed in the fastest way that the model allows.

    They are sums over tokens, not means, so a token's weight does not depend on how the examples are batched.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.packed = can_pack(model)
        """Whether examples are packed end to end in one row, without padding; a route then counts tokens, not rows."""
        self._head_is_last = _head_is_last(model)

    @contextmanager
    def of(self, examples: Sequence[Example]) -> Iterator[Tensor]:
        """Σ over an example's supervised tokens of -log p(token | the tokens before it) -> (B,), in fp32.

        The backward pass belongs inside the block: gradient checkpointing computes layers again.

        Only the N positions enter the output head, the most expensive layer of a small model. If the logits are the
        head's plain output, they are never held all at once either. Otherwise the model's own forward runs, with
        whatever it does to its logits (soft-capping, scaling).
        """
        batch = collate(examples, packed=self.packed, device=self.model.device)
        with nullcontext() if batch.position_ids is None else packed_sequences(self.model, batch.lengths):
            losses = self._of_tokens(batch)
            example = torch.arange(len(examples)).repeat_interleave(torch.tensor(batch.supervised)).to(losses.device)
            yield losses.new_zeros(len(examples)).index_add(0, example, losses)

    def _of_tokens(self, batch: Batch) -> Tensor:
        """Return the loss of each supervised token (N,)."""
        model, head = self.model, self.model.get_output_embeddings()
        targets = F.pad(batch.labels[:, 1:], (0, 1), value=UNSUPERVISED)  # the token that each position predicts
        supervised = targets != UNSUPERVISED
        inputs: dict[str, Any] = {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "position_ids": batch.position_ids,
            "use_cache": False,
        }
        # An adapter replaces the forward of the head and needs all rows, as the route counts them.
        adapted = head is None or "forward" in vars(head)
        if self._head_is_last and not adapted and not head.weight.requires_grad:  # type: ignore[union-attr]
            hidden = model.base_model(**inputs).last_hidden_state[supervised]
            return HeadLoss.apply(hidden, head, targets[supervised], torch.is_grad_enabled())
        with nullcontext() if adapted else _only(supervised, head):
            logits = model(**inputs).logits
        logits = logits[supervised] if adapted else logits.flatten(0, -2)
        return F.cross_entropy(logits.float(), targets[supervised], reduction="none")


class HeadLoss(torch.autograd.Function):
    """-log softmax(h Wᵀ)[target] for h (N, H), a frozen head of weight W (V, H) and targets (N,) -> (N,).

    The gradient with respect to h is computed with the loss, a few rows at a time, so that (N, V) never exists and
    the head runs once (the idea of Liger's fused linear cross-entropy, arXiv:2410.10989).
    """

    @staticmethod
    # pyrefly: ignore [bad-override]  (torch's Function takes any signature)
    def forward(ctx: Any, hidden: Tensor, head: nn.Linear, targets: Tensor, differentiate: bool) -> Tensor:
        product, head_back = _products(head)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        losses: list[Tensor] = []
        gradients: list[Tensor] = []
        for rows, row_targets in zip(hidden.split(ROWS), targets.split(ROWS), strict=True):
            logprobs = product(rows).to(dtype).log_softmax(-1)
            pause()
            losses.append(-logprobs.gather(1, row_targets[:, None]).squeeze(1))
            if differentiate:
                probs = logprobs.exp_()
                probs[torch.arange(len(row_targets), device=row_targets.device), row_targets] -= 1
                pause()
                gradients.append(head_back(probs.to(hidden.dtype)))
        ctx.save_for_backward(*([torch.cat(gradients)] if gradients else []))
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    # pyrefly: ignore [bad-override]
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[:, None].to(gradient.dtype), None, None, None


def _products(head: nn.Linear) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Return the head's product, rows (N, H) -> (N, V), and its gradient, (N, V) -> (N, H); no bias."""
    weight = head.weight
    if isinstance(head, FrozenLinear):
        return head.forward, head.input_grad
    if not weight.is_cpu:
        return head.forward, partial(input_grad, weight=weight)

    def product(rows: Tensor) -> Tensor:
        y = rows.new_empty(len(rows), len(weight))
        for part in blocks(weight, PART):
            torch.mm(rows, weight[part].T, out=y[:, part])
        return y

    def gradient(grad: Tensor) -> Tensor:
        # The sum over the parts is rounded once.
        dx = torch.zeros(len(grad), weight.shape[1], dtype=torch.promote_types(grad.dtype, torch.float32))
        for part in blocks(weight, PART):
            if grad.dtype == dx.dtype:
                dx.addmm_(grad[:, part], weight[part])
            else:
                dx += grad[:, part] @ weight[part]
        return dx.to(grad.dtype)

    return product, gradient


@torch.no_grad()
def _head_is_last(model: PreTrainedModel) -> bool:
    """Return whether the logits are exactly head(base_model(tokens)), by trying a few tokens."""
    head = model.get_output_embeddings()
    if not (type(head) is nn.Linear or isinstance(head, FrozenLinear)) or head.bias is not None:
        return False
    calls: list[tuple[Tensor, Tensor]] = []
    handle = head.register_forward_hook(lambda _, inputs, output: calls.append((inputs[0], output)))
    try:
        # Several tokens: the padding's embedding is often zero, and then its logits are zero whatever is done to them.
        ids = torch.arange(8, device=model.device)[None] % head.out_features
        logits = model(input_ids=ids, use_cache=False).logits
        hidden = getattr(model.base_model(input_ids=ids, use_cache=False), "last_hidden_state", None)
    finally:
        handle.remove()
    if hidden is None or len(calls) != 1:
        return False
    (head_input, head_output) = calls[0]
    return torch.equal(head_input, hidden) and torch.equal(head_output, logits)


@contextmanager
def _only(positions: Tensor, head: nn.Module) -> Iterator[None]:
    """Let only the hidden states (…, H) at these N positions into the head, as (1, N, H)."""
    thread = threading.get_ident()

    def select(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
        # Other threads may use this model.
        return (inputs[0][positions][None],) if threading.get_ident() == thread else None

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()
