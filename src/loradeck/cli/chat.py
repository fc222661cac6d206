"""`loradeck chat`: a conversation that changes adapters between turns. Knows the terminal; generates nothing itself."""

import contextlib
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from loradeck.cli import blend
from loradeck.cli.options import Adapters, Dtype, Sampling
from loradeck.cli.screen import shown
from loradeck.errors import ConfigError, LoradeckError

if TYPE_CHECKING:
    from loradeck.base.load import Base
    from loradeck.lora.bank import Bank
    from loradeck.lora.routing import RouteEntry

HELP = """\
/adapter NAME         answer through this adapter
/blend a=0.7 b=0.3    answer through several, at these weights
/base                 answer through none
/reset                forget the conversation
/help                 show this
/quit                 leave, as the end of input does"""


@dataclass(frozen=True, kw_only=True)
class Lively(Sampling):
    """Sampling, with defaults for a conversation."""

    max_new_tokens: int = 512
    temperature: float = 0.7
    top_p: float = 0.9


LIVELY = Lively()


def chat(
    base: str,
    /,
    *,
    adapters: Adapters = (),
    sampling: Lively = LIVELY,
    dtype: Dtype = "auto",
) -> None:
    """Talk with a base, and switch adapters between turns.

    ADAPTER is a folder, or a blend as in adapters/poet*0.7+adapters/pirate*0.3;
    the first one answers first. Ctrl-C ends an answer, /help lists what else can
    be typed.

    Args:
        base: A folder, a hub id, a .gguf file, or smollm2-135m.
    """
    blend.check(adapters)

    from loradeck.base.load import Base
    from loradeck.lora.bank import Bank

    loaded = Base.load(base, dtype=dtype)
    if loaded.tokenizer.chat_template is None:
        raise ConfigError(
            f"{loaded.name} has no chat template, so it cannot keep up a conversation",
            mend="Take a base tuned for chat, or continue a text with `loradeck generate`.",
        )
    bank = Bank(loaded.model)
    entries = blend.load(bank, adapters)
    names = bank.names()
    print(shown(f"{loaded.name} with {', '.join(names) or 'no adapter'}; /help lists the commands"))
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives `input` its line editing
    Chat(loaded, bank, sampling, entries[0] if entries else None).run()


@dataclass
class Chat:
    """A conversation so far, and who answers next."""

    base: "Base"
    bank: "Bank"
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
                print(shown(f"adapters: {', '.join(self.bank.names()) or 'none; name them with --adapter'}"))
            case _:
                raise ConfigError(f"{line!r} is no command", mend="/help lists them.")

    def switch(self, entry: "RouteEntry") -> None:
        """Let another adapter answer from the next turn on, and print how long that took."""
        begun = time.perf_counter()
        with self.bank.route(entry):
            took = time.perf_counter() - begun
        self.entry = entry
        print(shown(f"{self.speaker}, switched in {took * 1e6:.0f} µs"))

    def answer(self, text: str) -> None:
        """Print the answer as it comes, and keep both; on Ctrl-C, as far as it came.

        Raises:
            LoradeckError: the conversation no longer fits the base; it is as it was before.
        """
        from loradeck.generation import stream

        turn = [*self.messages, {"role": "user", "content": text}]
        pieces = stream(self.base, self.bank, turn, self.entry, **asdict(self.sampling))
        said = ""
        with contextlib.suppress(KeyboardInterrupt):
            for piece in pieces:
                said += piece
                print(shown(piece), end="", flush=True)
        print()
        self.messages = [*turn, {"role": "assistant", "content": said}]


def _blend(parts: list[str]) -> dict[str, float]:
    try:
        return {name: float(weight) for name, _, weight in (part.rpartition("=") for part in parts)}
    except ValueError:
        raise ConfigError("that is no blend", mend="Write it as in /blend poet=0.7 pirate=0.3") from None
