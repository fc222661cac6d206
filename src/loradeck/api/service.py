"""What a server serves, from settings that another process can start it from too: a base, a store, and who may ask."""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from loradeck.api.config import ServerConfig
from loradeck.errors import ConfigError
from loradeck.live.config import LiveConfig
from loradeck.serve.config import EngineConfig

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from loradeck.api.auth import ApiKeys
    from loradeck.base.task import Task
    from loradeck.base.weights import Weights
    from loradeck.serve.engine import Engine
    from loradeck.serve.pooling_engine import PoolingEngine
    from loradeck.store import AdapterStore

LIVE_FOLDER = ".live"  # in the folder of adapters; a store lists no hidden folders
WAITING = 8  # requests that wait for a store elsewhere; each has a thread


@dataclass(frozen=True, kw_only=True)
class ServiceConfig:
    """The settings of a service. They can be pickled."""

    base: str
    """A folder, a hub id, a .gguf file, or smollm2-135m."""
    adapters: str | None = None
    """A folder of adapters' folders, or the URL of a store."""
    keys: str | None = None
    """A file of API keys with the permissions of each."""
    dtype: str = "auto"
    weights: str = "blocks"
    """Their format; see `loradeck.base.weights`."""
    task: str = "generate"
    draft_model: str | None = None
    """A smaller base with the same tokenizer, which drafts tokens that the base then checks."""
    train: bool = False
    """Whether the server trains adapters too."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    live: LiveConfig = field(default_factory=LiveConfig)

    def __post_init__(self) -> None:
        if self.draft_model and self.task != "generate":
            raise ConfigError("a draft model is only for the task generate", hint="Leave one of them out.")

    def api_keys(self) -> "ApiKeys":
        """Read the API keys.

        Raises:
            ConfigError: the file is invalid.
        """
        from loradeck.api.auth import ApiKeys

        return ApiKeys.load(Path(self.keys)) if self.keys else ApiKeys()

    def store(self) -> "AdapterStore | None":
        """Open the store, and check that it can be read.

        Raises:
            AdapterError: it cannot be read.
            ConfigError: its URL cannot be used.
        """
        from loradeck.store import AdapterStore

        store = AdapterStore(self.adapters, waiting=WAITING) if self.adapters else None
        if store:
            store.names()
        return store


@dataclass(frozen=True)
class Service:
    """An engine, and its application."""

    engine: "Engine | PoolingEngine"
    application: "Starlette"


@contextmanager
def serving(config: ServiceConfig, keys: "ApiKeys", store: "AdapterStore | None") -> Iterator[Service]:
    """Load the base and start its engine; stop it at the end of the block. The log goes to stderr.

    Raises:
        BaseModelError, ConfigError: the base cannot be loaded, or the settings do not fit it.
    """
    if config.engine.hub:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # they would be drawn into the log
    from loradeck.api.app import app
    from loradeck.api.log import logging_to
    from loradeck.api.metrics import Metrics
    from loradeck.base.load import Base
    from loradeck.serve.engine import Engine
    from loradeck.serve.pooling_engine import PoolingEngine

    with logging_to(sys.stderr, config.server), ExitStack() as stack:
        weights, task = cast("Weights", config.weights), cast("Task", config.task)
        base = Base.load(config.base, dtype=config.dtype, weights=weights, task=task)
        start = PoolingEngine
        if task == "generate":
            draft = config.draft_model and Base.load(config.draft_model, dtype=config.dtype, weights=weights)
            start = partial(Engine, draft_model=draft or None)
        metrics = Metrics(base.name, config.server.top_adapters)
        engine = stack.enter_context(start(base, store, config.engine, observer=metrics))
        training = None
        if config.train and store:
            from loradeck.live.live_training import LiveTraining

            training = stack.enter_context(LiveTraining(engine, store.folder / LIVE_FOLDER, config.live))
        yield Service(engine, app(engine, metrics, keys=keys, config=config.server, training=training))
