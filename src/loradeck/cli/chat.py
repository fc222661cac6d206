"""`loradeck chat`: a conversation in which adapters can change between turns."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from loradeck.base.onednn import cap_kernel_cache
from loradeck.cli import blend
from loradeck.cli.chat_backends import ChatBackend, Local, Remote
from loradeck.cli.display.text import printable, terminal_width
from loradeck.cli.display.wrap import WordWrap
from loradeck.cli.options import Activations, Adapters, AnyBase, Dtype, SamplingOptions, System, Weights
from loradeck.errors import ConfigError, LoradeckError

if TYPE_CHECKING:
    from loradeck.lora.routing import RouteEntry

SHOWN = 8  # names of adapters in a line
HELP = """\
/adapter NAME         answer with this adapter
/blend a=0.7 b=0.3    answer with several, at these weights
/base                 answer with no adapter
/reset                forget the conversation
/help                 show this
/quit                 leave; so does the end of input"""


@dataclass(frozen=True, kw_only=True)
class ChatSampling(SamplingOptions):
    """Sampling options with the defaults of a conversation."""

    max_new_tokens: int = 512
    temperature: float = 0.7
    top_p: float = 0.9


SAMPLING = ChatSampling()


def chat(
    base: str | None = None,
    /,
    *,
    server: str | None = None,
    key: Annotated[str, Parameter(env_var="LORADECK_KEY", show_default=False)] = "",
    system: System = None,
    adapters: Adapters = (),
    any_base: AnyBase = False,
    sampling: ChatSampling = SAMPLING,
    dtype: Dtype = "auto",
    weights: Weights = "blocks",
    activations: Activations = "auto",
) -> None:
    """Chat with a base or a server; switch adapters between turns.

    ADAPTER is a folder, or a blend such as adapters/poet*0.7+adapters/pirate*0.3;
    with --server it is a name or a blend of names. The first one answers first.
    Ctrl-C stops an answer; /help lists the commands.

    Args:
        base: A folder, a hub id, a .gguf file, or smollm2-135m.
        server: Instead of a base, the URL of `loradeck serve` or of any OpenAI-compatible server.
        key: The server's API key.
    """
    if (base is None) == (server is None):
        raise ConfigError("chat needs either a base or a server", hint="Give BASE, or --server URL.")
    if server is not None:
        from loradeck.cli.openai_client import OpenAIClient

        blends: Sequence[blend.Blend | None] = [blend.parse(text) for text in adapters]
        client = OpenAIClient(server, key)
        backend: ChatBackend = Remote(client, client.models())
    else:
        assert base is not None
        cap_kernel_cache()
        backend, blends = Local.load(base, dtype, weights, adapters, any_base=any_base, activations=activations)
    print(printable(f"{backend.name} with {_listed(backend.names()) or 'no adapter'}; /help lists the commands"))
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives `input` line editing
    Chat(backend, sampling, blends[0] or None if blends else None, system).run()


@dataclass
class Chat:
    """The messages so far, and the adapter that answers next."""

    backend: ChatBackend
    sampling: SamplingOptions
    entry: "RouteEntry" = None
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    def run(self) -> None:
        """Read and answer lines until /quit or the end of input; an error ends a turn, not the conversation."""
        while True:
            try:
                line = input(f"{self.speaker} > ").strip()
            except EOFError:
                print()
                return
            if line == "/quit":
                return
            try:
                if line.startswith("/"):
                    self.command(line)
                elif line:
                    self.answer(line)
            except LoradeckError as error:
                print(printable(error.report()))

    @property
    def speaker(self) -> str:
        """The name of what answers next."""
        if isinstance(self.entry, Mapping):
            return " ".join(name if weight == 1 else f"{name}={weight:g}" for name, weight in self.entry.items())
        return self.entry or "base"

    def command(self, line: str) -> None:
        """Run a command such as /adapter poet.

        Raises:
            LoradeckError: unknown command or adapter.
        """
        match line.split():
            case ["/adapter", name]:
                self.switch(name)
            case ["/blend", *parts] if parts:
                self.switch(_blend(parts))
            case ["/base"]:
                self.switch(None)
            case ["/reset"]:
                self.messages.clear()
                print("conversation reset")
            case ["/help"]:
                print(HELP)
                print(printable(_listed(self.backend.names()) or "no adapter"))
            case _:
                raise ConfigError(f"unknown command {line!r}", hint="/help lists the commands.")

    def switch(self, entry: "RouteEntry") -> None:
        """Answer with another adapter from the next turn on."""
        remark = self.backend.switch(entry)
        self.entry = entry
        print(printable(f"{self.speaker}, {remark}"))

    def answer(self, text: str) -> None:
        """Print the answer as it arrives and append both messages; after Ctrl-C, the part that arrived.

        Raises:
            LoradeckError: the conversation exceeds the context, or the server refuses; the messages stay as they were.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        opening = [] if self.system is None else [{"role": "system", "content": self.system}]
        answer, wrap = "", WordWrap(terminal_width())
        with contextlib.suppress(KeyboardInterrupt):
            for piece in self.backend.stream([*opening, *messages], self.entry, self.sampling):
                answer += piece
                print(wrap.push(printable(piece)), end="", flush=True)
        print(wrap.rest())
        self.messages = [*messages, {"role": "assistant", "content": answer}]


def _listed(names: Sequence[str]) -> str:
    """Return the names, or the number of many with the first few."""
    if len(names) <= SHOWN:
        return ", ".join(names)
    return f"{len(names):,} adapters: {', '.join(names[:SHOWN])} and {len(names) - SHOWN:,} more"


def _blend(parts: list[str]) -> dict[str, float]:
    try:
        return {name: float(weight) for name, _, weight in (part.rpartition("=") for part in parts)}
    except ValueError:
        raise ConfigError("invalid blend", hint="Write it as in /blend poet=0.7 pirate=0.3") from None
