"""`POST /v1/completions`: continues texts or token ids."""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from anyio.to_thread import run_sync
from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from loradeck.api import parse, prompt
from loradeck.api.keys import Key
from loradeck.api.logprobs import Logprobs
from loradeck.api.requests import COMPLETION_REFUSES, CompletionRequest
from loradeck.api.respond import answer, finish_of
from loradeck.api.responses import CompletionAnswer, CompletionChoice, CompletionLogprobs, Usage
from loradeck.api.sampling import sampling_of
from loradeck.api.state import ServerState
from loradeck.api.streaming import Events

if TYPE_CHECKING:
    from loradeck.serve.generation import Generation, TextChunk

LENGTH = 16  # OpenAI's default


@dataclass(frozen=True, slots=True)
class Completions:
    """The route."""

    door: ServerState

    async def answer(self, request: Request) -> Response | Events:
        """Answer one request."""
        asked = await parse.read(request, CompletionRequest, self.door.settings.max_body_bytes, COMPLETION_REFUSES)
        generations, echoes = await run_sync(self._submit, request.state.key, asked)
        model = asked.model or self.door.names.base
        shape = CompletionShape(asked, model, self.door.fingerprint, self.door.logprobs, echoes)
        return await answer(self.door, request, asked, generations, shape)

    def _submit(self, key: Key, asked: CompletionRequest) -> "tuple[list[Generation], list[str]]":
        """Return the generations, and for each the prompt's text if the answer repeats it."""
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
        generations = door.submit(key, chosen, asked, prompts, sampling, continues=True)
        return generations, [text if asked.echo else "" for text in echoes for _ in range(asked.n or 1)]


@dataclass(frozen=True, slots=True)
class CompletionShape:
    """The JSON of completions."""

    asked: CompletionRequest
    model: str
    fingerprint: str
    logprobs: Logprobs
    echoes: Sequence[str]
    """For each choice, the text that comes before the answer."""
    id: str = field(default_factory=lambda: f"cmpl-{secrets.token_hex(16)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(
        self, generations: "Sequence[Generation]", chunks: "Sequence[Sequence[TextChunk]]", usage: Usage
    ) -> CompletionAnswer:
        """Return `text_completion`."""
        choices = []
        for index, (generation, own) in enumerate(zip(generations, chunks, strict=True)):
            text = self.echoes[index] + "".join(chunk.text for chunk in own)
            logprobs = self._logprobs(index, own, generation if self.asked.echo else None)
            choices.append(CompletionChoice(index, text, logprobs, finish_of(generation)))
        return self._answer(*choices, usage=usage)

    def begin(self, index: int, generation: "Generation") -> CompletionAnswer | None:
        """Return the event of an echoed prompt."""
        if not self.asked.echo:
            return None
        return self._answer(CompletionChoice(index, self.echoes[index], self._logprobs(index, [], generation)))

    def grow(self, index: int, chunk: "TextChunk") -> CompletionAnswer | None:
        """Return the event of some text."""
        if not chunk.text and self.asked.logprobs is None:
            return None
        return self._answer(CompletionChoice(index, chunk.text, self._logprobs(index, [chunk])))

    def end(self, index: int, generation: "Generation") -> CompletionAnswer:
        """Return the event with the finish reason."""
        return self._answer(CompletionChoice(index, "", finish_reason=finish_of(generation)))

    def usage(self, usage: Usage) -> CompletionAnswer:
        """Return the event with the usage."""
        return self._answer(usage=usage)

    def _answer(self, *choices: CompletionChoice, usage: Usage | UnsetType = UNSET) -> CompletionAnswer:
        return CompletionAnswer(self.id, self.created, self.model, list(choices), self.fingerprint, usage)

    def _logprobs(
        self, index: int, chunks: "Sequence[TextChunk]", prompt_of: "Generation | None" = None
    ) -> CompletionLogprobs | None:
        """Return the log-probabilities of some chunks, after those of a generation's prompt if one is given."""
        if self.asked.logprobs is None:
            return None
        echo = self.echoes[index]
        tokens = [chunk.token for chunk in chunks if chunk.token]
        offsets = [len(echo) + chunk.offset for chunk in chunks if chunk.token]
        if prompt_of:
            tokens = prompt_of.prompt + tokens
            offsets = self.logprobs.places(prompt_of.request.prompt, echo) + offsets
        return self.logprobs.completion(tokens, offsets)
