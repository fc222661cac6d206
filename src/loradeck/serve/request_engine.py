"""What all engines share: a base, a store of adapters, a queue within limits, and an end."""

import operator
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from threading import Lock
from types import TracebackType
from typing import Generic, Self, SupportsIndex

from transformers import PreTrainedTokenizerBase

from loradeck.base import openmp
from loradeck.base.load import Base
from loradeck.base.text import stop_ids
from loradeck.errors import BusyError, ConfigError
from loradeck.lora.adapter import Adapter
from loradeck.lora.added_rows import shared_count
from loradeck.lora.bank import Bank
from loradeck.lora.routing import RouteEntry
from loradeck.serve.adapter_cache import AdapterCache
from loradeck.serve.config import EngineConfig
from loradeck.serve.request_loop import AnyAnswer, AnyStats, Arrival, Background, RequestLoop
from loradeck.serve.served_model import ServedModel
from loradeck.store import AdapterStore
from loradeck.stored import Stored


class RequestEngine(Generic[AnyAnswer, AnyStats]):
    """Any thread submits requests and reads their answers; one thread computes."""

    _loop: RequestLoop[AnyAnswer, AnyStats]

    def __init__(
        self,
        base: Base,
        store: AdapterStore | None,
        config: EngineConfig,
        bank: Bank,
        *,
        vocabulary: int,
        prepare: Callable[[Adapter], None] = lambda _: None,
    ) -> None:
        """Create an engine whose loop is still to be started.

        `bank` is that of the model that computes, `vocabulary` the number of tokens that the model knows. `prepare` is
        called with each new adapter before its first step.
        """
        self.base = base
        self.store = store
        self.config = config
        self.adapter_cache = AdapterCache(bank, store, config, lambda: self._loop.wake(), prepare)
        self._vocabulary = vocabulary
        self._lock = Lock()
        self._draining = False

    def _start(self, loop: RequestLoop[AnyAnswer, AnyStats]) -> None:
        """Compute from now on."""
        self._loop = loop
        openmp.release()  # the calling thread's: from now on the engine's thread computes
        loop.start()

    @property
    def stats(self) -> AnyStats:
        """The current load: running and waiting requests."""
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
        vocabulary = self._vocabulary
        if len(key) < 2 or tokenizer is not self.base.tokenizer:  # else a blend whose tokenizers differ
            added = ((self.adapter_cache.added_tokens(adapters[sha256]), weight) for sha256, weight in key)
            vocabulary += shared_count(added)
        ends = stop_ids(tokenizer, getattr(self.base.model, "generation_config", None))
        stops = frozenset(end for end in ends if end < vocabulary)  # some tokenizers have more
        return ServedModel(key, adapters, tokenizer, stops, vocabulary)

    def tokenizer_of(self, *adapters: Stored) -> PreTrainedTokenizerBase:
        """Return the tokenizer of requests for these adapters. Reads the disk.

        Raises:
            AdapterError: the tokenizer of one cannot be used.
        """
        return self.base.adapter_tokenizers.of(
            replace(stored.tokenizer_files, added_tokens=self.adapter_cache.added_tokens(stored)) for stored in adapters
        )

    def _add(self, arrivals: Sequence[Arrival[AnyAnswer]]) -> None:
        """Queue requests, all or none; they begin together.

        Raises:
            BusyError: too many requests wait, or the engine is shutting down.
        """
        with self._lock:
            if self._draining or self._loop.failed:
                raise BusyError("the engine is shutting down", retry_after=1)
            waiting = self._loop.waiting
            if waiting >= self.config.max_waiting:
                raise BusyError(f"{waiting} requests are waiting", retry_after=self.stats.estimated_wait(waiting))
            self._loop.add(arrivals)

    def check_tokens(self, tokens: Iterable[int], model: ServedModel) -> None:
        """Check that the base, or the adapters of a request, have these tokens.

        Raises:
            ConfigError: an unknown token id.
        """
        unknown = [token for token in tokens if not 0 <= token < model.vocabulary]
        if unknown:
            added = model.vocabulary - self._vocabulary
            more = f", its adapters {added} more" if added else ""
            raise ConfigError(
                f"unknown token id {min(unknown)}; the base has {self._vocabulary}{more}",
                hint="Use the tokenizer of the base, or of the adapter.",
            )

    # ---- what the thread does beside requests

    def attach(self, background: Background) -> None:
        """Let the engine's thread do a background's work too, in turns with its requests.

        Raises:
            BusyError: the engine is shutting down.
            ConfigError: it has a background.
        """
        with self._lock:
            if self._draining or self._loop.failed:
                raise BusyError("the engine is shutting down", retry_after=1)
            self._loop.attach(background)

    def detach(self, background: Background) -> None:
        """Give the engine's thread no more of a background's work, once it has done what it is doing."""
        self._loop.detach(background)

    def wake(self) -> None:
        """Tell the engine's thread that there may be something to do."""
        self._loop.wake()

    # ---- the end

    def drain(self, seconds: float) -> None:
        """Take no new requests, let the present ones end within `seconds`, and cancel the rest."""
        with self._lock:
            self._draining = True
        deadline = time.monotonic() + seconds
        while live := self._loop.live:
            if time.monotonic() >= deadline:
                for answer in live:
                    answer.cancel()
            time.sleep(0.01)

    def close(self) -> None:
        """Cancel all requests, end the engine's threads, and free its memory."""
        with self._lock:
            self._draining = True
        self._loop.stop()
        self.adapter_cache.close()
        self.adapter_cache.bank.detach()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


def token_ids(tokens: Iterable[SupportsIndex]) -> list[int]:
    """Return token ids as integers.

    Raises:
        ConfigError: they are none.
    """
    try:
        return [operator.index(token) for token in tokens]
    except TypeError as error:
        python = "Encode a text with loradeck.base.text.encode(engine.resolve(name).tokenizer, text)."
        raise ConfigError("a prompt is a list of token ids", python=python) from error
