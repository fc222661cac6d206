"""One step of the model for a batch of requests, each through its own adapters.

T tokens of the step   S positions with logits   V vocabulary
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loradeck.errors import BaseModelError
from loradeck.lora.adapter import Adapter
from loradeck.lora.bank import Bank
from loradeck.ops.dispatch import warm_up
from loradeck.runner import attention
from loradeck.runner.attention import Decode, Part, PromptChunk
from loradeck.runner.kv_cache import KVCache, KVLayout
from loradeck.runner.request import Key, Scheduled
from loradeck.runner.trial import Trial


class ModelRunner:
    """A model that computes batches of requests over a KV cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Replace a model's attention. The model is the runner's own from now on: see `base.weights.shared_copy`.

        Raises:
            BaseModelError: the model does not compute the same then.
            LoradeckError: the model already has a bank.
        """
        self.model = model
        self.bank = Bank(model)
        warm_up(model.device)
        self.vocabulary: int = model.get_input_embeddings().num_embeddings  # type: ignore[union-attr]
        try:
            self.trial = Trial(model)
            model.set_attn_implementation(attention.NAME)
            self.layout = self._layout()
            self.trial.check(self)
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError, KeyError) as error:
            raise _unsupported(model, str(error).partition("\n")[0]) from error

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        return self.layout.token_bytes

    def new_cache(self, budget: int) -> KVCache:
        """Return an empty KV cache of this many bytes."""
        return KVCache(self.layout, budget)

    def prepare(self, adapter: Adapter) -> None:
        """Do nothing: adapters are read where the bank holds them."""

    def is_batch_invariant(self, key: Key) -> bool:  # noqa: ARG002
        """Return False: torch's products depend on how many rows they have."""
        return False

    def run(self, batch: Sequence[Scheduled], cache: KVCache) -> list[Tensor]:
        """Compute a step. Return the logits (S, V) of each scheduled request's last `logits_to_keep` tokens."""
        order, parts = _arrange(batch, cache)
        pieces = dict(zip(order, self.compute([batch[index] for index in order], parts), strict=True))
        return [pieces[index] for index in range(len(batch))]

    def compute(self, works: Sequence[Scheduled], parts: Sequence[Part]) -> list[Tensor]:
        """Compute a step whose parts are in the order of the batch. Return the logits as `run` does."""
        tokens = [
            token
            for work in works
            for token in work.request.tokens[work.request.computed : work.request.computed + work.count]
        ]
        positions = [work.request.computed + i for work in works for i in range(work.count)]
        ends = torch.tensor([work.count for work in works]).cumsum(0).tolist()
        keep = [i for work, end in zip(works, ends, strict=True) for i in range(end - work.logits_to_keep, end)]
        device = self.layout.device
        routes = [dict(work.request.key) or None for work in works]
        with (
            torch.no_grad(),  # not inference_mode: its tensors do not record whether they were written to
            attention.step(parts),
            self.bank.route(
                routes,
                lengths=[work.count for work in works],
                logits_to_keep=[work.logits_to_keep for work in works],
            ),
        ):
            logits = self.model(
                input_ids=torch.tensor([tokens], device=device),
                position_ids=torch.tensor([positions], device=device),
                use_cache=False,
                logits_to_keep=torch.tensor(keep, dtype=torch.long, device=device),
            ).logits[0]
        return [*logits.split([work.logits_to_keep for work in works])]

    def _layout(self) -> KVLayout:
        with torch.inference_mode(), attention.observed_shapes() as shapes:
            self.model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.model.device), use_cache=False)
        if sorted(shapes) != [*range(len(shapes))] or not shapes:
            raise ValueError("not all of its layers have an attention that can be replaced")
        return KVLayout(tuple(shapes[layer] for layer in sorted(shapes)), self.model.dtype, self.model.device)


def _arrange(batch: Sequence[Scheduled], cache: KVCache) -> tuple[list[int], list[Part]]:
    """Return the order of the batch in the step, and its parts: single tokens by pool and row, then chunks."""
    rows = [cache.row(work.request) for work in batch]
    by_pool: dict[int, list[int]] = {}
    for index, work in enumerate(batch):
        if work.count == 1:
            by_pool.setdefault(rows[index][0].capacity, []).append(index)
    order: list[int] = []
    parts: list[Part] = []
    for capacity in sorted(by_pool):
        indices = sorted(by_pool[capacity], key=lambda index: rows[index][1])
        positions = [batch[index].request.computed for index in indices]
        parts.append(Decode(rows[indices[0]][0], len(order), [rows[index][1] for index in indices], positions))
        order += indices
    start = len(order)
    for index, work in enumerate(batch):
        if work.count > 1:
            pool, row = rows[index]
            parts.append(PromptChunk(pool, start, row, work.request.computed, work.count))
            order.append(index)
            start += work.count
    return order, parts


def _unsupported(model: PreTrainedModel, reason: str) -> BaseModelError:
    return BaseModelError(
        f"{type(model).__name__} cannot be served: {reason}", hint="Use `loradeck generate`, which takes any model."
    )
