"""Many generations at once on one base, each through its own adapters. Prompts are token ids.

Any thread submits requests and reads their answers; one thread computes (`serve.loop`).
"""

import logging
import operator
import time
import uuid
from collections.abc import Iterable, Sequence
from threading import Lock
from types import TracebackType
from typing import Self, SupportsIndex

from transformers import PreTrainedTokenizerBase

from loradeck.base import openmp
from loradeck.base.load import Base
from loradeck.base.text import stop_ids
from loradeck.base.weights import shared_copy
from loradeck.errors import BusyError, ConfigError
from loradeck.lora.routing import RouteEntry
from loradeck.runner.choice import runner_of
from loradeck.runner.draft_model import DraftModel
from loradeck.runner.request import Request
from loradeck.sampling import SamplingParams, Token
from loradeck.serve.adapter_cache import AdapterCache
from loradeck.serve.config import EngineConfig
from loradeck.serve.drafter import Drafter
from loradeck.serve.generation import Generation
from loradeck.serve.loop import Loop
from loradeck.serve.scheduler import Scheduler
from loradeck.serve.served_model import ServedModel
from loradeck.serve.stats import Observer, Stats
from loradeck.serve.stop_strings import StopFilter
from loradeck.store import AdapterStore
from loradeck.stored import Stored

DEFAULT = SamplingParams()

log = logging.getLogger(__name__)


class Engine:
    """Continuous batching over one base and any adapters of a store.

    The base is not changed: the engine works on a copy that shares its weights.
    """

    def __init__(
        self,
        base: Base,
        store: AdapterStore | None = None,
        config: EngineConfig | None = None,
        *,
        draft_model: Base | None = None,
        observer: Observer | None = None,
    ) -> None:
        """Start to serve a base. `draft_model` is a smaller one that drafts tokens for it, with the same tokenizer.

        Raises:
            BaseModelError: the base's attention cannot be computed row by row.
            ConfigError: the base was loaded for another task or takes no int8 activations, kv_cache_bytes is too small
                for it, or the draft model has another vocabulary.
            LoradeckError: the base's model already has a bank.
        """
        base.check_generates()
        self.base = base
        self.store = store
        self.config = config or EngineConfig()
        self._runner = runner_of(
            shared_copy(base.model), enforce_eager=self.config.enforce_eager, activations=self.config.activations
        )
        drafts = self.config.num_speculative_tokens > 0 and self._runner.is_batch_invariant(())
        if self.config.num_speculative_tokens and not drafts:
            log.info("no tokens are drafted: only the compiled step computes the same bits with and without drafts")
        model = None
        if draft_model and drafts:
            model = DraftModel(draft_model, base, self._runner, self.config.kv_cache_bytes)
        elif draft_model:
            log.warning("the draft model %s is not used: no tokens are drafted", draft_model.name)
        cache = self._runner.new_cache(self.config.kv_cache_bytes)
        if not cache.max_tokens:
            raise ConfigError(
                f"kv_cache_bytes={self.config.kv_cache_bytes} holds no row of this base",
                hint=f"A token takes {self._runner.token_bytes} bytes.",
            )
        self._longest = min(cache.max_tokens, base.context or cache.max_tokens)
        self.adapter_cache = AdapterCache(
            self._runner.bank, store, self.config, lambda: self._loop.wake(), self._runner.prepare
        )
        self._loop = Loop(
            self._runner,
            cache,
            Scheduler(self.config, cache, self.adapter_cache),
            Drafter(self.config, cache, self._runner.is_batch_invariant, longest=self._longest, model=model),
            self.adapter_cache,
            longest=self._longest,
            observer=observer,
        )
        self._lock = Lock()
        self._draining = False
        openmp.release()  # the calling thread's: from now on the engine's thread computes
        self._loop.start()

    @property
    def stats(self) -> Stats:
        """The current load: running and waiting requests, KV cache use."""
        return self._loop.stats

    @property
    def failed(self) -> bool:
        """Whether it has stopped computing because of an error, which is in the log."""
        return self._loop.failed

    # ---- requests

    def resolve(self, entry: RouteEntry = None) -> ServedModel:
        """Return the adapters that an entry names now, with their tokenizer, for `submit`. Reads the disk.

        An adapter whose folder has a tokenizer or a chat template of its own has that; a blend has its adapters' if
        they agree on one; all others have the base's.

        Raises:
            UnknownAdapterError: the store has no such adapter.
            AdapterError: an adapter, or its tokenizer, cannot be used.
            ConfigError: the adapters are larger than the budget.
        """
        key, adapters = self.adapter_cache.resolve(entry)
        tokenizer = self.tokenizer_of(*adapters.values())
        ends = self._in_vocabulary(stop_ids(tokenizer, self.base.model.generation_config))
        return ServedModel(key, adapters, tokenizer, ends)

    def tokenizer_of(self, *adapters: Stored) -> PreTrainedTokenizerBase:
        """Return the tokenizer of requests for these adapters. Reads the disk.

        Raises:
            AdapterError: the tokenizer of one cannot be used.
        """
        return self.base.adapter_tokenizers.of(stored.tokenizer_files for stored in adapters)

    def submit(
        self,
        tokens: Sequence[int],
        entry: RouteEntry | ServedModel = None,
        sampling: SamplingParams = DEFAULT,
        *,
        tenant: str = "",
        adapter: str = "",
        continues: bool = True,
    ) -> Generation:
        """Submit a prompt, as token ids, to be continued through adapters of the store. Any thread may; reads the disk.

        Iterate over the answer for its tokens, or ask for its `text()`. It ends at `sampling.stop` and the other
        limits even if nobody reads it.

        `entry` is None for the base, a name or name@version, {name: weight}, or what `resolve` returned for one of them
        when the prompt was encoded. `adapter` is its name in metrics. The tokens of an adapter are shared fairly
        between its `tenant`s. `continues` says whether the answer continues the prompt's text or begins one of its own,
        without a leading space, as in a chat.

        Raises:
            UnknownAdapterError, AdapterError: as `resolve`.
            ConfigError: the prompt is empty, too long, not a list of token ids, or has unknown ones.
            BusyError: too many requests wait, or the engine is shutting down.
        """
        prompt = _token_ids(tokens)
        self._check(prompt, sampling)
        model = entry if isinstance(entry, ServedModel) else self.resolve(entry)
        request = Request(
            prompt,
            sampling,
            model.key,
            uuid.uuid4().hex,
            stop_ids=model.stop_ids,
            adapter=adapter,
            versions=model.versions,
            tenant=tenant,
            arrived=time.monotonic(),
        )
        context = prompt if continues else ()
        text = StopFilter(model.tokenizer, sampling.stop, context, min_tokens=sampling.min_tokens)
        generation = Generation(request, text, self._loop.wake)
        with self._lock:
            if self._draining or self._loop.failed:
                raise BusyError("the engine is shutting down", retry_after=1)
            waiting = self._loop.waiting
            if waiting >= self.config.max_waiting:
                raise BusyError(f"{waiting} requests are waiting", retry_after=self.stats.estimated_wait(waiting))
            self._loop.add(generation, model.adapters)
        return generation

    def stream(self, tokens: Sequence[int], entry: RouteEntry = None, sampling: SamplingParams = DEFAULT) -> Generation:
        """Return the tokens that continue a prompt, as they come: `async for token in engine.stream(...)`, or `for`.

        Raises:
            LoradeckError: as `submit`.
        """
        return self.submit(tokens, entry, sampling)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        entries: RouteEntry | Sequence[RouteEntry] = None,
        sampling: SamplingParams | Sequence[SamplingParams] = DEFAULT,
    ) -> list[list[Token]]:
        """Return the tokens that continue each prompt. `entries` and `sampling` are one for all prompts or one each.

        Raises:
            ConfigError: the numbers of prompts, entries and sampling parameters differ.
            LoradeckError: as `submit`; or a request failed.
        """
        count = len(prompts)
        routes = [*entries] if isinstance(entries, Sequence) and not isinstance(entries, str) else [entries] * count
        params = [*sampling] if isinstance(sampling, Sequence) else [sampling] * count
        if not count == len(routes) == len(params):
            raise ConfigError(
                f"{count} prompts, {len(routes)} entries, {len(params)} sampling parameters",
                hint="Give the same number of each, or one.",
            )
        generations: list[Generation] = []
        try:
            for prompt, route, how in zip(prompts, routes, params, strict=True):
                generations.append(self.submit(prompt, route, how))
            return [[*generation] for generation in generations]
        finally:
            for generation in generations:
                generation.cancel()

    # ---- the end

    def drain(self, seconds: float) -> None:
        """Take no new requests, let the present ones end within `seconds`, and cancel the rest."""
        with self._lock:
            self._draining = True
        deadline = time.monotonic() + seconds
        while live := self._loop.live:
            if time.monotonic() >= deadline:
                for generation in live:
                    generation.cancel()
            time.sleep(0.01)

    def close(self) -> None:
        """Cancel all requests, end the engine's threads, and free its memory."""
        with self._lock:
            self._draining = True
        self._loop.stop()
        self.adapter_cache.close()
        self._runner.bank.detach()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    # ---- checks

    def check_tokens(self, tokens: Iterable[int]) -> None:
        """Check that the base has these tokens.

        Raises:
            ConfigError: an unknown token id.
        """
        used = {*tokens}
        unknown = used - self._in_vocabulary(used)
        if unknown:
            raise ConfigError(
                f"unknown token id {min(unknown)}; the base has {self._runner.vocabulary}",
                hint="Use the base's own tokenizer.",
            )

    def _in_vocabulary(self, tokens: Iterable[int]) -> frozenset[int]:
        """Return the tokens that the model has logits for; some tokenizers have more."""
        return frozenset(token for token in tokens if 0 <= token < self._runner.vocabulary)

    def _check(self, tokens: Sequence[int], sampling: SamplingParams) -> None:
        self.check_tokens([*tokens, *sampling.logit_bias, *sampling.stop_token_ids])
        if not tokens:
            raise ConfigError("the prompt is empty", hint="Give at least one token.")
        if len(tokens) + min(sampling.max_tokens, 1) > self._longest:
            raise ConfigError(
                f"a prompt of {len(tokens)} tokens leaves no room; a row has at most {self._longest}",
                hint="Shorten the prompt, or raise kv_cache_bytes if the base reads more.",
            )


def _token_ids(prompt: Iterable[SupportsIndex]) -> list[int]:
    try:
        return [operator.index(token) for token in prompt]
    except TypeError as error:
        python = "Encode a text with loradeck.base.text.encode(engine.resolve(name).tokenizer, text)."
        raise ConfigError("a prompt is a list of token ids", python=python) from error
