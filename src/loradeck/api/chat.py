"""`POST /v1/chat/completions`: answers a conversation."""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from anyio.to_thread import run_sync
from starlette.requests import Request
from starlette.responses import Response

from loradeck.api import parse, prompt
from loradeck.api.errors import HttpError
from loradeck.api.keys import Key
from loradeck.api.logprobs import Logprobs
from loradeck.api.requests import CHAT_REFUSES, ChatRequest
from loradeck.api.respond import answer, finish_of
from loradeck.api.responses import (
    AnswerMessage,
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatLogprobs,
    Delta,
    Usage,
)
from loradeck.api.sampling import sampling_of
from loradeck.api.state import ServerState
from loradeck.api.streaming import Events

if TYPE_CHECKING:
    from loradeck.serve.generation import Generation, TextChunk


@dataclass(frozen=True, slots=True)
class Chat:
    """The route."""

    door: ServerState

    async def answer(self, request: Request) -> Response | Events:
        """Answer one request."""
        asked = await parse.read(request, ChatRequest, self.door.settings.max_body_bytes, CHAT_REFUSES)
        generations = await run_sync(self._submit, request.state.key, asked)
        logprobs = self.door.logprobs if asked.logprobs else None
        shape = ChatShape(asked.model or self.door.names.base, self.door.fingerprint, logprobs)
        return await answer(self.door, request, asked, generations, shape)

    def _submit(self, key: Key, asked: ChatRequest) -> "list[Generation]":
        chosen = self.door.choose(key, asked)
        if asked.top_logprobs and not asked.logprobs:
            raise HttpError(400, "top_logprobs are told only with logprobs=true.", param="top_logprobs")
        ids = prompt.chat(self.door.engine.base.tokenizer, asked)
        most = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
        length = self.door.length(ids, most)
        logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
        continues = bool(asked.continue_final_message)
        return self.door.submit(key, chosen, asked, [ids], [sampling_of(asked, length, logprobs)], continues=continues)


@dataclass(frozen=True, slots=True)
class ChatShape:
    """The JSON of chat answers."""

    model: str
    fingerprint: str
    logprobs: Logprobs | None
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(16)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(
        self, generations: "Sequence[Generation]", chunks: "Sequence[Sequence[TextChunk]]", usage: Usage
    ) -> ChatAnswer:
        """Return `chat.completion`."""
        choices = [
            ChatChoice(
                index, AnswerMessage("".join(chunk.text for chunk in own)), self._logprobs(own), finish_of(generation)
            )
            for index, (generation, own) in enumerate(zip(generations, chunks, strict=True))
        ]
        return ChatAnswer(self.id, self.created, self.model, choices, usage, self.fingerprint)

    def begin(self, index: int, _: "Generation") -> ChatChunk:
        """Return the chunk with the role."""
        return self._chunk(ChatChunkChoice(index, Delta("assistant", "")))

    def grow(self, index: int, chunk: "TextChunk") -> ChatChunk | None:
        """Return the chunk of some text."""
        if not chunk.text and self.logprobs is None:
            return None
        return self._chunk(ChatChunkChoice(index, Delta(content=chunk.text), self._logprobs([chunk])))

    def end(self, index: int, generation: "Generation") -> ChatChunk:
        """Return the chunk with the finish reason."""
        return self._chunk(ChatChunkChoice(index, Delta(), finish_reason=finish_of(generation)))

    def usage(self, usage: Usage) -> ChatChunk:
        """Return the chunk with the usage."""
        chunk = self._chunk()
        chunk.usage = usage
        return chunk

    def _chunk(self, *choices: ChatChunkChoice) -> ChatChunk:
        return ChatChunk(self.id, self.created, self.model, list(choices), self.fingerprint)

    def _logprobs(self, chunks: "Sequence[TextChunk]") -> ChatLogprobs | None:
        if self.logprobs is None:
            return None
        return ChatLogprobs([self.logprobs.chat(chunk.token) for chunk in chunks if chunk.token is not None])
