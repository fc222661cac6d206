"""Many generations at once on one base, each through its own adapters. Prompts are token ids.

Any thread hands requests in and reads their answers; one thread computes (`serve.loop`).
"""

import time
import uuid
from collections.abc import Iterable, Sequence
from threading import Lock
from types import TracebackType
from typing import Self

from loradeck.base.load import Base
from loradeck.base.shared_copy import shared_copy
from loradeck.base.text import stop_ids
from loradeck.errors import BusyError, ConfigError
from loradeck.lora.routing import RouteEntry
from loradeck.serve import threads
from loradeck.serve.adapter_cache import AdapterCache
from loradeck.serve.config import EngineConfig
from loradeck.serve.generation import Generation
from loradeck.serve.kv_cache import KVCache
from loradeck.serve.loop import Loop
from loradeck.serve.model_runner import ModelRunner
from loradeck.serve.observer import Observer
from loradeck.serve.request import Request, SamplingParams, Token
from loradeck.serve.sampler import Sampler
from loradeck.serve.scheduler import Scheduler
from loradeck.serve.stats import Stats
from loradeck.serve.stop_strings import StopFilter
from loradeck.store import AdapterStore

DEFAULT = SamplingParams()


class Engine:
    """Continuous batching over one base, and any adapters of a store.

    The base itself is left as it is: the engine works on a twin that shares its weights.
    """

    def __init__(
        self,
        base: Base,
        store: AdapterStore | None = None,
        config: EngineConfig | None = None,
        *,
        observer: Observer | None = None,
    ) -> None:
        """Begin to serve a base.

        Raises:
            BaseModelError: the base's attention cannot be computed row by row.
            LoradeckError: the base's model has a bank; its adapters are on it for others.
        """
        self.base = base
        self.store = store
        self.config = config or EngineConfig()
        self._runner = ModelRunner(shared_copy(base.model))
        cache = KVCache(self._runner.form, self.config.kv_cache_bytes)
        if not cache.longest:
            raise ConfigError(
                f"kv_cache_bytes={self.config.kv_cache_bytes} holds no row of this base",
                hint=f"A token takes {self._runner.form.token_bytes} bytes.",
            )
        self._longest = min(cache.longest, base.context or cache.longest)
        self.residency = AdapterCache(self._runner.bank, store, self.config, lambda: self._loop.wake())
        self._loop = Loop(
            self._runner,
            cache,
            Sampler(self._known(stop_ids(base.tokenizer, base.model.generation_config))),
            Scheduler(self.config, cache, self.residency),
            self.residency,
            longest=self._longest,
            observer=observer,
        )
        self._lock = Lock()
        self._draining = False
        threads.release()  # this thread's: the engine's is the one that computes from now on
        self._loop.start()

    @property
    def stats(self) -> Stats:
        """How full it is."""
        return self._loop.stats

    @property
    def failed(self) -> bool:
        """Whether it has stopped computing, for a reason that is in the log."""
        return self._loop.failed

    # ---- asking

    def submit(
        self,
        tokens: Sequence[int],
        entry: RouteEntry = None,
        sampling: SamplingParams = DEFAULT,
        *,
        tenant: str = "",
        adapter: str = "",
        continues: bool = True,
    ) -> Generation:
        """Submit a prompt, as token ids, to be continued through adapters of the store. Any thread may; reads the disk.

        Iterate over the answer for its tokens, or ask for its `text()`. It ends at `sampling.stop` and the other
        limits even if nobody reads it.

        `entry` is None for the base, a name or name@version, or {name: weight}; `adapter` is what to call it in
        metrics, and an adapter's tokens are shared fairly between its `tenant`s. `continues` says whether the answer
        continues the prompt's text, or begins one of its own, without a leading space, as in a chat.

        Raises:
            UnknownAdapterError: there is no such adapter.
            AdapterError: it cannot be used.
            ConfigError: the prompt is empty, has ids that the base does not know, or is too long.
            BusyError: too many wait, or the engine is about to end.
        """
        self._check(tokens, sampling)
        key, found = self.residency.resolve(entry)
        request = Request(
            uuid.uuid4().hex, [*tokens], len(tokens), key, sampling, adapter, tenant, arrived=time.monotonic()
        )
        text = StopFilter(
            self.base.tokenizer, sampling.stop, tokens if continues else (), min_tokens=sampling.min_tokens
        )
        generation = Generation(request, text, self._loop.wake)
        with self._lock:
            if self._draining or self._loop.failed:
                raise BusyError("the engine is about to end", retry_after=1)
            waiting = self._loop.waiting
            if waiting >= self.config.max_waiting:
                raise BusyError(f"{waiting} requests wait already", retry_after=self.stats.wait(waiting))
            self._loop.add(generation, found)
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
        """Return what continues each prompt, whole; `entries` and `sampling` are one for all prompts or one for each.

        Raises:
            ConfigError: not as many entries or samplings as prompts.
            LoradeckError: as `submit`; or a request failed.
        """
        each = (
            [*entries] if isinstance(entries, Sequence) and not isinstance(entries, str) else [entries] * len(prompts)
        )
        how = [*sampling] if isinstance(sampling, Sequence) else [sampling] * len(prompts)
        if not len(prompts) == len(each) == len(how):
            raise ConfigError(
                f"{len(prompts)} prompts, {len(each)} entries, {len(how)} samplings",
                hint="Give as many of each, or one.",
            )
        generations: list[Generation] = []
        try:
            for prompt, entry, own in zip(prompts, each, how, strict=True):
                generations.append(self.submit(prompt, entry, own))
            return [[*generation] for generation in generations]
        finally:
            for generation in generations:
                generation.cancel()

    def drain(self, seconds: float) -> None:
        """Take nothing new, let what is here end within so many seconds, and cancel the rest."""
        with self._lock:
            self._draining = True
        until = time.monotonic() + seconds
        while live := self._loop.live:
            if time.monotonic() >= until:
                for generation in live:
                    generation.cancel()
            time.sleep(0.01)

    def close(self) -> None:
        """Cancel what is here, end the engine's threads, and give its memory back."""
        with self._lock:
            self._draining = True
        self._loop.stop()
        self.residency.close()
        self._runner.bank.detach()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def _known(self, tokens: Iterable[int]) -> frozenset[int]:
        """Return those of these tokens that the base has scores for; some tokenizers have more."""
        return frozenset(token for token in tokens if 0 <= token < self._runner.vocabulary)

    def _check(self, tokens: Sequence[int], sampling: SamplingParams) -> None:
        asked = [*tokens, *sampling.logit_bias, *sampling.stop_tokens]
        strange = {*asked} - self._known(asked)
        if strange:
            known = self._runner.vocabulary
            raise ConfigError(f"{min(strange)} is no token of the base, which has {known}", hint="Give token ids.")
        if not tokens:
            raise ConfigError("the prompt is empty", hint="Give at least one token to go on from.")
        if len(tokens) + min(sampling.max_tokens, 1) > self._longest:
            raise ConfigError(
                f"a prompt of {len(tokens)} tokens leaves no room; a row has {self._longest} at most",
                hint="Shorten the prompt, or raise kv_cache_bytes if the base reads more.",
            )
