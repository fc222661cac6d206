"""Rows of many clients at once on one base that classifies, rewards or embeds, each through its own adapters."""

import time
import uuid
from collections.abc import Sequence

from loradeck.base.load import Base
from loradeck.base.task import POOLING, check_task
from loradeck.base.weights import shared_copy
from loradeck.errors import ConfigError
from loradeck.lora.bank import Bank
from loradeck.lora.routing import RouteEntry
from loradeck.ops.dispatch import warm_up
from loradeck.runner.pooling_runner import PoolingRow, PoolingRunner
from loradeck.runner.request import Request
from loradeck.sampling import SamplingParams
from loradeck.serve.config import EngineConfig
from loradeck.serve.pooling_loop import PoolingLoop
from loradeck.serve.pooling_result import PoolingResult
from loradeck.serve.request_engine import RequestEngine, token_ids
from loradeck.serve.served_model import ServedModel
from loradeck.serve.stats import Observer, Stats
from loradeck.store import AdapterStore

NOTHING_TO_GENERATE = SamplingParams(max_tokens=0)


class PoolingEngine(RequestEngine[PoolingResult, Stats]):
    """Batches of rows on one base and any adapters of a store.

    The base is not changed: the engine works on a copy that shares its weights. Of the configuration, what concerns
    the KV cache, drafts and the compiled step has no effect; a row is never cut, so one that is longer than
    `max_step_tokens` is a batch of its own.
    """

    def __init__(
        self,
        base: Base,
        store: AdapterStore | None = None,
        config: EngineConfig | None = None,
        *,
        observer: Observer | None = None,
    ) -> None:
        """Start to serve a base.

        Raises:
            ConfigError: the base was loaded to generate.
            LoradeckError: the base's model already has a bank.
        """
        check_task(base.task, POOLING)
        config = config or EngineConfig()
        bank = Bank(shared_copy(base.model))
        warm_up(base.model.device)
        vocabulary: int = base.model.get_input_embeddings().num_embeddings  # type: ignore[union-attr]
        super().__init__(base, store, config, bank, vocabulary=vocabulary)
        self._start(PoolingLoop(PoolingRunner(base, bank), config, self.adapter_cache, observer))

    def submit(
        self,
        rows: Sequence[PoolingRow | Sequence[int]],
        entry: RouteEntry | ServedModel = None,
        *,
        tenant: str = "",
        adapter: str = "",
    ) -> list[PoolingResult]:
        """Submit rows, all through the same adapters of the store. Any thread may; reads the disk.

        `entry` is None for the base, a name or name@version, {name: weight}, or what `resolve` returned for one of
        them. `adapter` is its name in metrics. The tokens of an adapter are shared fairly between its `tenant`s.

        Raises:
            UnknownAdapterError, AdapterError: as `resolve`.
            ConfigError: a row is empty, too long, not a list of token ids, or has unknown ones.
            BusyError: too many requests wait, or the engine is shutting down.
        """
        model = entry if isinstance(entry, ServedModel) else self.resolve(entry)
        checked = [self._checked(row, model) for row in rows]
        labels = next((stored.facts.labels for stored in model.adapters.values() if stored.facts.labels), ())
        answers = []
        for row in checked:
            request = Request(
                row.tokens,
                NOTHING_TO_GENERATE,
                model.key,
                uuid.uuid4().hex,
                adapter=adapter,
                versions=model.versions,
                tenant=tenant,
                arrived=time.monotonic(),
            )
            answers.append(PoolingResult(request, row, labels, self._loop.wake))
        self._add([(answer, model.adapters) for answer in answers])
        return answers

    def _checked(self, row: PoolingRow | Sequence[int], model: ServedModel) -> PoolingRow:
        tokens = token_ids(row.tokens if isinstance(row, PoolingRow) else row)
        self.check_tokens(tokens, model)
        if not tokens:
            raise ConfigError("the input is empty", hint="Give at least one token.")
        if self.base.context is not None and len(tokens) > self.base.context:
            raise ConfigError(
                f"an input of {len(tokens)} tokens; a row has at most {self.base.context}", hint="Shorten the input."
            )
        return PoolingRow(tokens, row.types if isinstance(row, PoolingRow) else ())
