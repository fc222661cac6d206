"""Many generations at once on one base, each through its own adapters. Prompts are token ids.

Any thread submits requests and reads their answers; one thread computes (`serve.loop`).
"""

import logging
import time
import uuid
from collections.abc import Sequence

from loradeck.base.load import Base
from loradeck.base.weights import shared_copy
from loradeck.errors import ConfigError
from loradeck.lora.routing import RouteEntry
from loradeck.runner.choice import runner_of
from loradeck.runner.draft_model import DraftModel
from loradeck.runner.request import Request
from loradeck.sampling import SamplingParams, Token
from loradeck.serve.config import EngineConfig
from loradeck.serve.drafter import Drafter
from loradeck.serve.generation import Generation
from loradeck.serve.loop import Loop
from loradeck.serve.request_engine import RequestEngine, token_ids
from loradeck.serve.request_loop import Arrival
from loradeck.serve.scheduler import Scheduler
from loradeck.serve.served_model import ServedModel
from loradeck.serve.stats import GenerationStats, Observer
from loradeck.serve.stop_strings import StopFilter
from loradeck.store import AdapterStore

DEFAULT = SamplingParams()

log = logging.getLogger(__name__)


class Engine(RequestEngine[Generation, GenerationStats]):
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
        config = config or EngineConfig()
        self._runner = runner_of(
            shared_copy(base.model), enforce_eager=config.enforce_eager, activations=config.activations
        )
        super().__init__(
            base,
            store,
            config,
            self._runner.bank,
            vocabulary=self._runner.vocabulary,
            prepare=self._runner.prepare,
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
        loop = Loop(
            self._runner,
            cache,
            Scheduler(self.config, cache, self.adapter_cache),
            Drafter(self.config, cache, self._runner.is_batch_invariant, longest=self._longest, model=model),
            self.adapter_cache,
            longest=self._longest,
            observer=observer,
        )
        self._start(loop)

    # ---- requests

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
        arrival = self._arrival(tokens, entry, sampling, tenant=tenant, adapter=adapter, continues=continues)
        self._add([arrival])
        return arrival[0]

    def _arrival(
        self,
        tokens: Sequence[int],
        entry: RouteEntry | ServedModel,
        sampling: SamplingParams,
        *,
        tenant: str = "",
        adapter: str = "",
        continues: bool = True,
    ) -> Arrival[Generation]:
        """As `submit`, without the queue."""
        prompt = token_ids(tokens)
        model = entry if isinstance(entry, ServedModel) else self.resolve(entry)
        self._check(prompt, sampling, model)
        request = Request(
            prompt,
            sampling,
            model.key,
            uuid.uuid4().hex,
            stop_ids=model.stop_ids,
            vocabulary=model.vocabulary,
            adapter=adapter,
            versions=model.versions,
            tenant=tenant,
            arrived=time.monotonic(),
        )
        context = prompt if continues else ()
        text = StopFilter(model.tokenizer, sampling.stop, context, min_tokens=sampling.min_tokens)
        return Generation(request, text, self._loop.wake), model.adapters

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
        """Return the tokens that continue each prompt; all begin together.

        `entries` and `sampling` are one for all prompts or one each.

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
        arrivals = [self._arrival(*request) for request in zip(prompts, routes, params, strict=True)]
        self._add(arrivals)
        try:
            return [[*generation] for generation, _ in arrivals]
        finally:
            for generation, _ in arrivals:
                generation.cancel()

    # ---- checks

    def _check(self, tokens: Sequence[int], sampling: SamplingParams, model: ServedModel) -> None:
        self.check_tokens([*tokens, *sampling.logit_bias, *sampling.stop_token_ids], model)
        if not tokens:
            raise ConfigError("the prompt is empty", hint="Give at least one token.")
        if len(tokens) + min(sampling.max_tokens, 1) > self._longest:
            raise ConfigError(
                f"a prompt of {len(tokens)} tokens leaves no room; a row has at most {self._longest}",
                hint="Shorten the prompt, or raise kv_cache_bytes if the base reads more.",
            )
