"""-log p of what is to be learned, document by document. Knows a model by its output head; knows no adapters, no jobs.

B documents   H width of the model   V vocabulary   N positions of the batch that predict a supervised token
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from loradeck.base.frozen import FrozenLinear
from loradeck.base.matmul import input_grad
from loradeck.dataset.example import UNSUPERVISED, Example
from loradeck.train.batching import Batch, collate
from loradeck.train.packing import documents, packable

# Rows of the head at once: enough for the matrix product to be at its best, few enough that (rows, V) stays small.
ROWS = 128


class Losses:
    """The losses of documents under one model, by the best of the ways that the model allows.

    Sums over tokens and not means: so how documents were batched does not change what a token weighs.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.packed = packable(model)
        """Whether documents lie end to end in one row, without padding; a route then counts tokens, not rows."""
        self._plain = _plain_head(model)

    @contextmanager
    def of(self, own: Sequence[Example]) -> Iterator[Tensor]:
        """Σ over a document's supervised tokens of -log p(token | the tokens before it) -> (B,), in fp32.

        The backward pass belongs inside the block: gradient checkpointing computes layers again.

        The model's own forward runs, so whatever it does to its logits (soft-capping, scaling) is done; but only the N
        positions enter the output head, the costliest layer of a small model. Where the logits are nothing but the
        head's output they are never held all at once either.
        """
        batch = collate(own, packed=self.packed, device=self.model.device)
        with nullcontext() if batch.position_ids is None else documents(self.model, batch.lengths):
            losses = self._of_tokens(batch)
            owner = torch.arange(len(own)).repeat_interleave(torch.tensor(batch.learned)).to(losses.device)
            yield losses.new_zeros(len(own)).index_add(0, owner, losses)

    def _of_tokens(self, batch: Batch) -> Tensor:
        """Return the loss of each supervised token (N,)."""
        model, head = self.model, self.model.get_output_embeddings()
        targets = F.pad(batch.labels[:, 1:], (0, 1), value=UNSUPERVISED)  # the token that each position predicts
        wanted = targets != UNSUPERVISED
        # Not where the head's forward is another's: an adapter there needs its rows to be the batch's.
        free = head is not None and "forward" not in vars(head)
        alone = free and self._plain and not head.weight.requires_grad  # type: ignore[union-attr]
        taken: list[Tensor] = []
        with _only(wanted, head, taken, skip=alone) if free else nullcontext():
            logits = model(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                position_ids=batch.position_ids,
                use_cache=False,
            ).logits
        if alone:
            return HeadLoss.apply(taken[0], head, targets[wanted], torch.is_grad_enabled())
        rows = logits.flatten(0, -2) if free else logits[wanted]
        return F.cross_entropy(rows.float(), targets[wanted], reduction="none")


class HeadLoss(torch.autograd.Function):
    """-log softmax(h Wᵀ)[target] for h (N, H), a frozen head of weight W (V, H) and targets (N,) -> (N,).

    The gradient with respect to h is made beside the loss, a few rows at a time, so that (N, V) never exists and
    the head is not computed twice (the idea of Liger's fused linear cross-entropy, arXiv:2410.10989).
    """

    @staticmethod
    # pyrefly: ignore [bad-override]  (torch's Function takes any signature)
    def forward(ctx: Any, hidden: Tensor, head: nn.Linear, targets: Tensor, differentiate: bool) -> Tensor:
        undo = head.input_grad if isinstance(head, FrozenLinear) else partial(input_grad, weight=head.weight)
        exact = torch.promote_types(hidden.dtype, torch.float32)
        losses: list[Tensor] = []
        gradients: list[Tensor] = []
        for rows, own in zip(hidden.split(ROWS), targets.split(ROWS), strict=True):
            scores = head.forward(rows).to(exact).log_softmax(-1)
            losses.append(-scores.gather(1, own[:, None]).squeeze(1))
            if differentiate:
                scores.exp_()[torch.arange(len(own), device=own.device), own] -= 1
                gradients.append(undo(scores.to(hidden.dtype)))
        ctx.save_for_backward(*([torch.cat(gradients)] if gradients else []))
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    # pyrefly: ignore [bad-override]
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[:, None].to(gradient.dtype), None, None, None


@torch.no_grad()
def _plain_head(model: PreTrainedModel) -> bool:
    """Say whether the model's logits are its head's output and nothing more, by trying a few tokens."""
    head = model.get_output_embeddings()
    if not (type(head) is nn.Linear or isinstance(head, FrozenLinear)) or head.bias is not None:
        return False
    seen: list[Tensor] = []
    handle = head.register_forward_hook(lambda _, __, output: seen.append(output))
    try:
        # Not the padding's alone: its embedding is often zero, and so are then its logits, whatever is done to them.
        ids = torch.arange(8, device=model.device)[None] % head.out_features
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        handle.remove()
    return len(seen) == 1 and torch.equal(logits, seen[0])


@contextmanager
def _only(wanted: Tensor, head: nn.Module, taken: list[Tensor], *, skip: bool) -> Iterator[None]:
    """Let only the wanted of the hidden states (…, H) into the head, as (1, N, H), and note them as (N, H).

    With `skip` a single one goes in, as a token of goodwill: the caller computes the head itself.
    """
    thread = threading.get_ident()

    def pick(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
        if threading.get_ident() != thread:
            return None  # others may use this model
        taken.append(inputs[0][wanted])
        return (taken[0][None, :1] if skip else taken[0][None],)

    handle = head.register_forward_pre_hook(pick)
    try:
        yield
    finally:
        handle.remove()
