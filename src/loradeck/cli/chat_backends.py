"""What answers in a chat: a base in this process, or a server."""

import difflib
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Protocol

from loradeck.blend import format_blend
from loradeck.cli import blend
from loradeck.cli.options import Activations, Adapters, Dtype, SamplingOptions, Weights
from loradeck.errors import ConfigError, UnknownAdapterError

if TYPE_CHECKING:
    from loradeck.base.load import Base
    from loradeck.cli.openai_client import OpenAIClient
    from loradeck.lora.bank import Bank
    from loradeck.lora.routing import RouteEntry


class ChatBackend(Protocol):
    """A base with adapters that answers messages."""

    @property
    def name(self) -> str:
        """The name of the base, or of the server."""
        ...

    def names(self) -> list[str]:
        """Return the names of the adapters."""
        ...

    def switch(self, entry: "RouteEntry", /) -> str:
        """Check that an adapter or blend can answer; return a remark for the user."""
        ...

    def stream(self, messages: list[dict[str, str]], entry: "RouteEntry", sampling: SamplingOptions) -> Iterator[str]:
        """Yield an answer in pieces."""
        ...


@dataclass(frozen=True)
class Local:
    """A base in this process."""

    base: "Base"
    bank: "Bank"
    activations: Activations = "auto"

    @classmethod
    def load(
        cls,
        base: str,
        dtype: Dtype,
        weights: Weights,
        adapters: Adapters,
        *,
        any_base: bool = False,
        activations: Activations = "auto",
    ) -> "tuple[Local, list[blend.Blend | None]]":
        """Load a base and adapters onto it; return also the argument of `bank.route` for each adapter."""
        files = blend.read(adapters)

        from loradeck.base.load import Base
        from loradeck.generation import tokenizers_of
        from loradeck.lora.bank import Bank

        loaded = Base.load(base, dtype=dtype, weights=weights)
        bank = Bank(loaded.model)
        blends = blend.load(bank, adapters, files, any_base=any_base)
        tokenizers = [loaded.tokenizer, *tokenizers_of(loaded, bank, blends)]
        if all(tokenizer.chat_template is None for tokenizer in tokenizers):
            raise ConfigError(
                f"{loaded.name} has no chat template",
                hint="Use a base tuned for chat, or continue a text with `loradeck generate`.",
            )
        return cls(loaded, bank, activations), blends

    @property
    def name(self) -> str:
        return self.base.name

    def names(self) -> list[str]:
        return self.bank.names()

    def switch(self, entry: "RouteEntry", /) -> str:
        start = time.perf_counter()
        with self.bank.route(entry):
            seconds = time.perf_counter() - start
        return f"switched in {seconds * 1e6:.0f} µs"

    def stream(self, messages: list[dict[str, str]], entry: "RouteEntry", sampling: SamplingOptions) -> Iterator[str]:
        from loradeck.generation import stream

        return stream(self.base, self.bank, messages, entry, **asdict(sampling), activations=self.activations)


@dataclass(frozen=True)
class Remote:
    """A server and the names of its models, the base first. The server checks an adapter when it is to answer."""

    client: "OpenAIClient"
    models: list[str]

    @property
    def name(self) -> str:
        return f"{self.models[0]} on {self.client.url}"

    def names(self) -> list[str]:
        return self.models[1:]

    def switch(self, _: "RouteEntry", /) -> str:
        return "from the next turn on"

    def stream(self, messages: list[dict[str, str]], entry: "RouteEntry", sampling: SamplingOptions) -> Iterator[str]:
        options = asdict(sampling)
        try:
            yield from self.client.stream(
                self._model(entry), messages, max_tokens=options.pop("max_new_tokens"), **options
            )
        except UnknownAdapterError as error:
            raise UnknownAdapterError(error.message, hint=self._close(entry)) from error

    def _close(self, entry: "RouteEntry") -> str:
        wanted = entry if isinstance(entry, Mapping) else [entry or ""]
        close = [name for each in wanted for name in difflib.get_close_matches(each, self.names(), n=3) if name != each]
        return f"Did you mean {' or '.join(dict.fromkeys(close))}?" if close else "/help lists the adapters."

    def _model(self, entry: "RouteEntry") -> str:
        return format_blend(entry.items()) if isinstance(entry, Mapping) else entry or self.models[0]
