"""Who answers in a conversation: a base in this process, or a server. Knows adapters' entries; prints nothing."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Protocol

from loradeck.cli import blend
from loradeck.cli.options import Adapters, Dtype, Sampling, Weights
from loradeck.errors import ConfigError

if TYPE_CHECKING:
    from loradeck.base.load import Base
    from loradeck.cli.openai_client import OpenAIClient
    from loradeck.lora.bank import Bank
    from loradeck.lora.routing import RouteEntry


class ChatBackend(Protocol):
    """Who answers."""

    @property
    def name(self) -> str:
        """The base's name, or the server's."""
        ...

    def names(self) -> list[str]:
        """Return the adapters there are."""
        ...

    def switch(self, entry: "RouteEntry", /) -> str:
        """Try what is to answer from now on, and return what is worth saying of it."""
        ...

    def stream(self, turn: list[dict[str, str]], entry: "RouteEntry", sampling: Sampling) -> Iterator[str]:
        """Yield an answer in pieces."""
        ...


@dataclass(frozen=True)
class Local:
    """A base in this process."""

    base: "Base"
    bank: "Bank"

    @classmethod
    def load(
        cls, base: str, dtype: Dtype, weights: Weights, adapters: Adapters
    ) -> "tuple[Local, list[blend.Blend | None]]":
        """Load a base and these adapters onto it, and return for each what `bank.route` takes too."""
        blend.check(adapters)

        from loradeck.base.load import Base
        from loradeck.lora.bank import Bank

        loaded = Base.load(base, dtype=dtype, weights=weights)
        if loaded.tokenizer.chat_template is None:
            raise ConfigError(
                f"{loaded.name} has no chat template, so it cannot keep up a conversation",
                hint="Take a base tuned for chat, or continue a text with `loradeck generate`.",
            )
        bank = Bank(loaded.model)
        return cls(loaded, bank), blend.load(bank, adapters)

    @property
    def name(self) -> str:
        return self.base.name

    def names(self) -> list[str]:
        return self.bank.names()

    def switch(self, entry: "RouteEntry", /) -> str:
        begun = time.perf_counter()
        with self.bank.route(entry):
            took = time.perf_counter() - begun
        return f"switched in {took * 1e6:.0f} µs"

    def stream(self, turn: list[dict[str, str]], entry: "RouteEntry", sampling: Sampling) -> Iterator[str]:
        from loradeck.generation import stream

        return stream(self.base, self.bank, turn, entry, **asdict(sampling))


@dataclass(frozen=True)
class Far:
    """A server and its models, the base first; which others there are is asked with each answer."""

    remote: "OpenAIClient"
    models: list[str]

    @property
    def name(self) -> str:
        return f"{self.models[0]} on {self.remote.url}"

    def names(self) -> list[str]:
        return self.models[1:]

    def switch(self, _: "RouteEntry", /) -> str:
        return "from the next turn on"

    def stream(self, turn: list[dict[str, str]], entry: "RouteEntry", sampling: Sampling) -> Iterator[str]:
        how = asdict(sampling)
        return self.remote.stream(self._model(entry), turn, max_tokens=how.pop("max_new_tokens"), **how)

    def _model(self, entry: "RouteEntry") -> str:
        if isinstance(entry, Mapping):
            return "+".join(name if weight == 1 else f"{name}*{weight:g}" for name, weight in entry.items())
        return entry or self.models[0]
