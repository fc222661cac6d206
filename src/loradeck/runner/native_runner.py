"""The model runner whose steps are computed in C, and what goes to transformers' modules instead.

The same request has the same bits alone, in any batch and in any chunks: every sum of a row has one order.
"""

import logging
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loradeck.lora.adapter import Adapter
from loradeck.native import pages, step
from loradeck.native.adapter import NativeAdapter
from loradeck.native.library import multiplies_halves
from loradeck.native.model import NativeModel
from loradeck.native.step import Chunk, Uses
from loradeck.runner.activations import INT8, Activations
from loradeck.runner.attention import AttentionParams, Part, attend_all
from loradeck.runner.description import describe
from loradeck.runner.model_runner import ModelRunner
from loradeck.runner.native_batch import packed_adapter
from loradeck.runner.paged_cache import PagedCache
from loradeck.runner.request import Key, Scheduled
from loradeck.runner.trial import check_with

log = logging.getLogger(__name__)


class NativeRunner:
    """Computes batches of requests over a KV cache in pages.

    Requests with an adapter of a module that the step does not know are computed by transformers' modules.
    """

    def __init__(self, eager: ModelRunner, activations: Activations = "auto") -> None:
        """Pack the runner's model.

        Raises:
            Exception: the model cannot be computed natively, or not on this machine; the text says why.
        """
        self.eager = eager
        self.bank, self.vocabulary = eager.bank, eager.vocabulary
        model = eager.model
        if model.device.type != "cpu":
            raise ValueError(f"it is on {model.device}")
        self.native = NativeModel(describe(model), halves=multiplies_halves(model.dtype), int8=INT8[activations])
        self._adapters: WeakKeyDictionary[Adapter, tuple[int, NativeAdapter | None]] = WeakKeyDictionary()
        check_with(self.native, activations, lambda: eager.trial.check(self, int8=self.native.int8))

    @property
    def model(self) -> PreTrainedModel:
        return self.eager.model

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        return self.native.page_bytes // pages.PAGE

    def new_cache(self, budget: int) -> PagedCache:
        """Return an empty KV cache of this many bytes."""
        return PagedCache(self.native.page_bytes, budget)

    def prepare(self, adapter: Adapter) -> None:
        """Pack an adapter, so that its first step need not."""
        self._packed(adapter)

    def is_batch_invariant(self, key: Key) -> bool:
        """Whether requests with these adapters have the same bits in any batch and in any chunks."""
        return self._uses(key) is not None

    def run(self, batch: Sequence[Scheduled], cache: PagedCache) -> list[Tensor]:
        """Compute a step. Return the logits (S, V) of each scheduled request's last `logits_to_keep` tokens."""
        uses = [self._uses(work.request.key) for work in batch]
        ours = [i for i, each in enumerate(uses) if each is not None]
        others = [i for i, each in enumerate(uses) if each is None]
        results: dict[int, Tensor] = {}
        if ours:
            chunks = [self._chunk(batch[i], cache, uses[i] or ()) for i in ours]
            logits = step.run(self.native, chunks, torch.get_num_threads())
            results |= zip(ours, logits.split([chunk.wanted for chunk in chunks]), strict=True)
        if others:
            works = [batch[i] for i in others]
            results |= zip(others, self.eager.compute(works, self._parts(works, cache)), strict=True)
        return [results[i] for i in range(len(batch))]

    def _chunk(self, work: Scheduled, cache: PagedCache, uses: Uses) -> Chunk:
        request = work.request
        return Chunk(work.tokens, request.computed, cache.table(request), uses, work.logits_to_keep)

    def _parts(self, works: Sequence[Scheduled], cache: PagedCache) -> list[Part]:
        parts: list[Part] = []
        start = 0
        for work in works:
            parts.append(PagedChunk(self.native, cache.pages(work.request), start, work.request.computed, work.count))
            start += work.count
        return parts

    def _uses(self, key: Key) -> Uses | None:
        """Return a request's adapters as the step reads them; None if it cannot compute one of them."""
        uses = [(self._packed(self.bank[sha256]), weight) for sha256, weight in key]
        if any(adapter is None for adapter, _ in uses):
            return None
        return tuple((adapter, weight) for adapter, weight in uses if adapter is not None)

    def _packed(self, adapter: Adapter) -> NativeAdapter | None:
        moves, packed = self._adapters.get(adapter, (-1, None))
        if moves == adapter.moves:
            return packed
        try:
            packed = packed_adapter(self.native, adapter)
        except ValueError as error:
            log.info("an adapter is computed by transformers' modules: %s", error)
            packed = None
        self._adapters[adapter] = adapter.moves, packed
        return packed


class PagedChunk:
    """Several tokens of one request whose keys and values lie in pages; in the step, they follow each other."""

    def __init__(self, model: NativeModel, addresses: Sequence[int], start: int, computed: int, length: int) -> None:
        """`start` is the first token's place in the step, `computed` its position."""
        self._model, self._pages = model, addresses
        self.start, self.stop = start, start + length
        self._computed, self._length = computed, length

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams) -> Tensor:
        """Query (1, Q, N, D), key and value (1, H, N, D) of the N new tokens -> (N, Q, D)."""
        pages.write(self._model, self._pages, layer, self._computed, key[0], value[0])
        keys, values = pages.read(self._model, self._pages, layer, self._computed + self._length)
        return attend_all(query, keys.to(query.dtype), values.to(query.dtype), self._computed, params)
