"""`POST /v1/completions`: texts or token ids in, what follows out. Knows the older shapes, as lm-eval reads them."""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from anyio.to_thread import run_sync
from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from loradeck.api import parse, prompt
from loradeck.api.choice import Choice, Piece
from loradeck.api.keys import Key
from loradeck.api.logprobs import Logprobs
from loradeck.api.requests import COMPLETION_REFUSES, CompletionRequest
from loradeck.api.respond import answer
from loradeck.api.responses import CompletionAnswer, CompletionChoice, CompletionLogprobs, Usage
from loradeck.api.sampling import sampling_of
from loradeck.api.state import ServerState
from loradeck.api.streaming import Events

LENGTH = 16  # OpenAI's default


@dataclass(frozen=True, slots=True)
class Completions:
    """The route."""

    door: ServerState

    async def answer(self, request: Request) -> Response | Events:
        """Answer one request."""
        asked = await parse.read(request, CompletionRequest, self.door.settings.max_body_bytes, COMPLETION_REFUSES)
        choices = await run_sync(self._begin, request.state.key, asked)
        model = asked.model or self.door.names.base
        shape = CompletionShape(asked, model, self.door.fingerprint, self.door.logprobs)
        return await answer(self.door, request, asked, choices, shape)

    def _begin(self, key: Key, asked: CompletionRequest) -> list[Choice]:
        door = self.door
        chosen = door.choose(key, asked)
        special = asked.add_special_tokens is not False
        prompts = prompt.texts(door.engine.base.tokenizer, asked.prompt, special=special)
        most = LENGTH if asked.max_tokens is None else asked.max_tokens
        before = asked.logprobs if asked.echo else None
        sampling = [sampling_of(asked, door.length(ids, most), asked.logprobs, before) for ids in prompts]
        given = [asked.prompt] if isinstance(asked.prompt, str) else asked.prompt[: len(prompts)]
        parts = zip(given, prompts, strict=True)
        echoes = [part if isinstance(part, str) else door.logprobs.text(ids) for part, ids in parts]
        choices = door.begin(key, chosen, asked, prompts, sampling, extends=True)
        for choice in choices if asked.echo else ():
            choice.echo = echoes[choice.index // (asked.n or 1)]
        return choices


@dataclass(frozen=True, slots=True)
class CompletionShape:
    """How answers to one request look."""

    asked: CompletionRequest
    model: str
    fingerprint: str
    logprobs: Logprobs
    id: str = field(default_factory=lambda: f"cmpl-{secrets.token_hex(16)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: Sequence[Choice], texts: Sequence[Sequence[Piece]], usage: Usage) -> CompletionAnswer:
        """Return `text_completion`."""
        made = []
        for choice, pieces in zip(choices, texts, strict=True):
            text = "".join(piece.text for piece in pieces)
            told = self._told(choice, pieces, echo=bool(self.asked.echo))
            made.append(CompletionChoice(choice.index, choice.echo + text, told, choice.finish))
        return self._answer(*made, usage=usage)

    def begun(self, choice: Choice) -> CompletionAnswer | None:
        """Return the event of an echoed prompt."""
        if not self.asked.echo:
            return None
        told = self._told(choice, [], echo=True)
        return self._answer(CompletionChoice(choice.index, choice.echo, told))

    def grown(self, choice: Choice, piece: Piece) -> CompletionAnswer | None:
        """Return the event of a piece."""
        if not piece.text and self.asked.logprobs is None:
            return None
        told = self._told(choice, [piece], echo=False)
        return self._answer(CompletionChoice(choice.index, piece.text, told))

    def ended(self, choice: Choice) -> CompletionAnswer:
        """Return the event that says why a choice ended."""
        return self._answer(CompletionChoice(choice.index, "", finish_reason=choice.finish))

    def spent(self, usage: Usage) -> CompletionAnswer:
        """Return the event of the usage."""
        return self._answer(usage=usage)

    def _answer(self, *choices: CompletionChoice, usage: Usage | UnsetType = UNSET) -> CompletionAnswer:
        return CompletionAnswer(self.id, self.created, self.model, list(choices), self.fingerprint, usage)

    def _told(self, choice: Choice, pieces: Sequence[Piece], *, echo: bool) -> CompletionLogprobs | None:
        if self.asked.logprobs is None:
            return None
        tokens = [piece.token for piece in pieces if piece.token]
        places = [len(choice.echo) + piece.place for piece in pieces if piece.token]
        if echo:
            tokens = choice.stream.prompt + tokens
            places = self.logprobs.places(choice.prompt, choice.echo) + places
        return self.logprobs.completion(tokens, places)
