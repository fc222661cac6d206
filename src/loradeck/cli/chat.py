"""`loradeck chat`: a conversation that changes adapters between turns. Knows the terminal; generates nothing itself."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from loradeck.cli import blend
from loradeck.cli.chat_backends import ChatBackend, Far, Local
from loradeck.cli.display.text import shown
from loradeck.cli.options import Adapters, Dtype, Sampling, Weights
from loradeck.errors import ConfigError, LoradeckError

if TYPE_CHECKING:
    from loradeck.lora.routing import RouteEntry

HELP = """\
/adapter NAME         answer through this adapter
/blend a=0.7 b=0.3    answer through several, at these weights
/base                 answer through none
/reset                forget the conversation
/help                 show this
/quit                 leave, as the end of input does"""


@dataclass(frozen=True, kw_only=True)
class ChatSampling(Sampling):
    """Sampling, with defaults for a conversation."""

    max_new_tokens: int = 512
    temperature: float = 0.7
    top_p: float = 0.9


LIVELY = ChatSampling()


def chat(
    base: str | None = None,
    /,
    *,
    server: str | None = None,
    key: Annotated[str, Parameter(env_var="LORADECK_KEY", show_default=False)] = "",
    adapters: Adapters = (),
    sampling: ChatSampling = LIVELY,
    dtype: Dtype = "auto",
    weights: Weights = "packed",
) -> None:
    """Talk with a base, or a server, and switch adapters between turns.

    ADAPTER is a folder, or a blend as in adapters/poet*0.7+adapters/pirate*0.3;
    of a server's, a name, or a blend of names. The first one answers first.
    Ctrl-C ends an answer, /help lists what else can be typed.

    Args:
        base: A folder, a hub id, a .gguf file, or smollm2-135m.
        server: In place of a base, the URL of `loradeck serve`, or of any server that speaks as OpenAI's.
        key: The server's API key.
    """
    if (base is None) == (server is None):
        raise ConfigError("a conversation is with a base or with a server", hint="Give BASE, or --server URL.")
    if server is not None:
        from loradeck.cli.openai_client import OpenAIClient

        blends = [dict(blend.parse(text)) for text in adapters]
        remote = OpenAIClient(server, key)
        partner: ChatBackend = Far(remote, remote.models())
    else:
        assert base is not None
        partner, blends = Local.load(base, dtype, weights, adapters)
    print(shown(f"{partner.name} with {', '.join(partner.names()) or 'no adapter'}; /help lists the commands"))
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives `input` its line editing
    Chat(partner, sampling, blends[0] or None if blends else None).run()


@dataclass
class Chat:
    """A conversation so far, and who answers next."""

    partner: ChatBackend
    sampling: Sampling
    entry: "RouteEntry" = None
    messages: list[dict[str, str]] = field(default_factory=list)

    def run(self) -> None:
        """Take turns until /quit or the end of input; an error ends a turn, not the conversation."""
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
                    self.obey(line)
                elif line:
                    self.answer(line)
            except LoradeckError as error:
                print(shown(f"{error}"))

    @property
    def speaker(self) -> str:
        """Who answers next, in words."""
        if isinstance(self.entry, Mapping):
            return " ".join(name if weight == 1 else f"{name}={weight:g}" for name, weight in self.entry.items())
        return self.entry or "base"

    def obey(self, line: str) -> None:
        """Carry out a command.

        Raises:
            LoradeckError: there is no such command or adapter.
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
                print("forgotten")
            case ["/help"]:
                print(HELP)
                print(shown(f"adapters: {', '.join(self.partner.names()) or 'none'}"))
            case _:
                raise ConfigError(f"{line!r} is no command", hint="/help lists them.")

    def switch(self, entry: "RouteEntry") -> None:
        """Let another adapter answer from the next turn on."""
        said = self.partner.switch(entry)
        self.entry = entry
        print(shown(f"{self.speaker}, {said}"))

    def answer(self, text: str) -> None:
        """Print the answer as it comes, and keep both; on Ctrl-C, as far as it came.

        Raises:
            LoradeckError: the conversation no longer fits the base, or the server refuses; it is as it was before.
        """
        turn = [*self.messages, {"role": "user", "content": text}]
        said = ""
        with contextlib.suppress(KeyboardInterrupt):
            for piece in self.partner.stream(turn, self.entry, self.sampling):
                said += piece
                print(shown(piece), end="", flush=True)
        print()
        self.messages = [*turn, {"role": "assistant", "content": said}]


def _blend(parts: list[str]) -> dict[str, float]:
    try:
        return {name: float(weight) for name, _, weight in (part.rpartition("=") for part in parts)}
    except ValueError:
        raise ConfigError("that is no blend", hint="Write it as in /blend poet=0.7 pirate=0.3") from None
