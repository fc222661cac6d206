"""One step of the model for a batch of requests, each through its own adapters. Knows tensors; chooses nothing.

T tokens of the step   S scored positions   V vocabulary
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loradeck.errors import BaseModelError
from loradeck.lora.bank import Bank
from loradeck.ops.dispatch import warm_up
from loradeck.serve import attention
from loradeck.serve.attention import Chunk, Part, Singles
from loradeck.serve.kv_cache import KVCache
from loradeck.serve.pool import Form
from loradeck.serve.request import Request, SamplingParams, Scheduled


class ModelRunner:
    """A model that computes batches of requests over a cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Take over a model's attention. It is the runner's own from now on: see `loradeck.base.weights.shared_copy`.

        Raises:
            BaseModelError: the model does not compute the same then.
            LoradeckError: it has a bank.
        """
        self.model = model
        self.bank = Bank(model)
        warm_up(model.device)
        self.vocabulary: int = model.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr]
        chance = torch.Generator().manual_seed(0)
        prompts = [torch.randint(self.vocabulary, (length,), generator=chance).tolist() for length in (7, 5)]
        try:
            with torch.inference_mode():
                alone = [model(input_ids=torch.tensor([own], device=model.device)).logits[0, -1] for own in prompts]
            model.set_attn_implementation(attention.NAME)
            self.form = self._form()
            self._check(prompts, alone)
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError, KeyError) as error:
            raise _refused(model, str(error).partition("\n")[0]) from error

    def run(self, batch: Sequence[Scheduled], cache: KVCache) -> list[Tensor]:
        """Compute a step. Of each request's work, return the scores (S, V) of what follows its scored tokens."""
        order, parts = _laid(batch, cache)
        works = [batch[index] for index in order]
        tokens = [t for work in works for t in work.request.tokens[work.request.computed :][: work.count]]
        positions = [at + work.request.computed for work in works for at in range(work.count)]
        ends = torch.tensor([work.count for work in works]).cumsum(0).tolist()
        scored = [at for work, end in zip(works, ends, strict=True) for at in range(end - work.scored, end)]
        device = self.form.device
        entries = [dict(work.request.key) or None for work in works]
        with (
            torch.no_grad(),  # not inference_mode, whose tensors do not tell whether they were written to
            attention.step(parts),
            self.bank.route(entries, lengths=[work.count for work in works]),
        ):
            logits = self.model(
                input_ids=torch.tensor([tokens], device=device),
                position_ids=torch.tensor([positions], device=device),
                use_cache=False,
                logits_to_keep=torch.tensor(scored, dtype=torch.long, device=device),
            ).logits[0]
        pieces = dict(zip(order, logits.split([work.scored for work in works]), strict=True))
        return [pieces[index] for index in range(len(batch))]

    def _form(self) -> Form:
        with torch.inference_mode(), attention.observed() as shapes:
            self.model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.model.device), use_cache=False)
        if sorted(shapes) != [*range(len(shapes))] or not shapes:
            raise ValueError("not all of its layers are attention that can be exchanged")
        return Form(tuple(shapes[layer] for layer in sorted(shapes)), self.model.dtype, self.model.device)

    def _check(self, prompts: Sequence[list[int]], alone: Sequence[Tensor]) -> None:
        """Compare prompts that are read in chunks, side by side, with what the model gave for each alone."""
        cache = KVCache(self.form, self.form.token_bytes << 10)
        requests = [Request(str(own), own, len(own), (), SamplingParams()) for own in prompts]
        rounding = 1e-3 if self.form.dtype == torch.float32 else 5e-2
        for counts in ((4, 1), (2, 4), (1, 0)):
            batch = [Scheduled(request, count) for request, count in zip(requests, counts, strict=True) if count]
            for work in batch:
                cache.reserve(work.request, work.request.computed + work.count)
            for work, scores in zip(batch, self.run(batch, cache), strict=True):
                if work.ends:
                    own = alone[requests.index(work.request)]
                    if not (scores[-1] - own).abs().max() <= rounding * own.abs().max():
                        raise ValueError("rows that are computed side by side come out otherwise")
                work.request.computed += work.count


def _laid(batch: Sequence[Scheduled], cache: KVCache) -> tuple[list[int], list[Part]]:
    """Return in which order the batch lies in the step, and its parts: single tokens by pool and row, then chunks."""
    places = [cache.place(work.request) for work in batch]
    singles: dict[int, list[int]] = {}
    for index, work in enumerate(batch):
        if work.count == 1:
            singles.setdefault(places[index][0].capacity, []).append(index)
    order: list[int] = []
    parts: list[Part] = []
    for capacity in sorted(singles):
        own = sorted(singles[capacity], key=lambda index: places[index][1])
        rows = [places[index][1] for index in own]
        parts.append(Singles(places[own[0]][0], len(order), rows, [batch[index].request.computed for index in own]))
        order += own
    start = len(order)
    for index, work in enumerate(batch):
        if work.count > 1:
            pool, row = places[index]
            parts.append(Chunk(pool, start, row, work.request.computed, work.count))
            order.append(index)
            start += work.count
    return order, parts


def _refused(model: PreTrainedModel, why: str) -> BaseModelError:
    return BaseModelError(
        f"{type(model).__name__} cannot be served: {why}", hint="Use `loradeck generate`, which takes any model."
    )
