"""The loss of a causal language model on what is to be learned. Knows a model by its output head; knows no adapters.

B sequences   T tokens   V vocabulary   N positions of the batch that predict a supervised token
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from loradeck.train.batching import Batch
from loradeck.train.example import UNSUPERVISED


def causal_loss(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, int]:
    """Σ over supervised tokens of -log p(token | the tokens before it), in fp32; and N, their number.

    The model's own forward runs, so whatever it does to its logits (soft-capping, scaling) is done; but only the N
    positions enter the output head, the costliest layer of a small model. Divide the sum by N, not by B: then how the
    tokens were batched does not change what each of them weighs.
    """
    targets = F.pad(batch.labels[:, 1:], (0, 1), value=UNSUPERVISED)  # (B, T): the token that each position predicts
    wanted = targets != UNSUPERVISED
    with _only(wanted, model.get_output_embeddings()):
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    if logits.shape[:2] == wanted.shape:  # never so for (1, N, V): N < T
        logits = logits[wanted]
    losses = F.cross_entropy(logits.flatten(0, -2).float(), targets[wanted], reduction="sum")
    return losses, int(wanted.sum())


@contextmanager
def _only(wanted: Tensor, head: nn.Module | None) -> Iterator[None]:
    """Let only the wanted (B, T) of the hidden states (B, T, H) into the head, as (1, N, H).

    Not where the head's forward is another's: an adapter there needs its rows to be the batch's.
    """
    if head is None or "forward" in vars(head):
        yield
        return
    thread = threading.get_ident()

    def pick(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
        return (inputs[0][wanted][None],) if threading.get_ident() == thread else None  # others may use this model

    handle = head.register_forward_pre_hook(pick)
    try:
        yield
    finally:
        handle.remove()
