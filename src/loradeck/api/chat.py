"""`POST /v1/chat/completions`: a conversation in, the next turn out. Knows chat's shapes."""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from anyio.to_thread import run_sync
from starlette.requests import Request
from starlette.responses import Response

from loradeck.api import parse, prompt
from loradeck.api.choice import Choice, Piece
from loradeck.api.errors import HttpError
from loradeck.api.keys import Key
from loradeck.api.logprobs import Logprobs
from loradeck.api.requests import CHAT_REFUSES, ChatRequest
from loradeck.api.respond import answer
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


@dataclass(frozen=True, slots=True)
class Chat:
    """The route."""

    door: ServerState

    async def answer(self, request: Request) -> Response | Events:
        """Answer one request."""
        asked = await parse.read(request, ChatRequest, self.door.settings.max_body_bytes, CHAT_REFUSES)
        choices = await run_sync(self._begin, request.state.key, asked)
        logprobs = self.door.logprobs if asked.logprobs else None
        shape = ChatShape(asked.model or self.door.names.base, self.door.fingerprint, logprobs)
        return await answer(self.door, request, asked, choices, shape)

    def _begin(self, key: Key, asked: ChatRequest) -> list[Choice]:
        chosen = self.door.choose(key, asked)
        if asked.top_logprobs and not asked.logprobs:
            raise HttpError(400, "top_logprobs are told only with logprobs=true.", param="top_logprobs")
        ids = prompt.chat(self.door.engine.base.tokenizer, asked)
        most = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
        length = self.door.length(ids, most)
        logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
        extends = bool(asked.continue_final_message)
        return self.door.begin(key, chosen, asked, [ids], [sampling_of(asked, length, logprobs)], extends=extends)


@dataclass(frozen=True, slots=True)
class ChatShape:
    """How chat's answers look."""

    model: str
    fingerprint: str
    logprobs: Logprobs | None
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(16)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: Sequence[Choice], texts: Sequence[Sequence[Piece]], usage: Usage) -> ChatAnswer:
        """Return `chat.completion`."""
        made = [
            ChatChoice(
                choice.index,
                AnswerMessage("".join(piece.text for piece in pieces)),
                self._told(pieces),
                choice.finish,
            )
            for choice, pieces in zip(choices, texts, strict=True)
        ]
        return ChatAnswer(self.id, self.created, self.model, made, usage, self.fingerprint)

    def begun(self, choice: Choice) -> ChatChunk:
        """Return the chunk that says who speaks."""
        return self._chunk(ChatChunkChoice(choice.index, Delta("assistant", "")))

    def grown(self, choice: Choice, piece: Piece) -> ChatChunk | None:
        """Return the chunk of a piece."""
        if not piece.text and self.logprobs is None:
            return None
        return self._chunk(ChatChunkChoice(choice.index, Delta(content=piece.text), self._told([piece])))

    def ended(self, choice: Choice) -> ChatChunk:
        """Return the chunk that says why a choice ended."""
        return self._chunk(ChatChunkChoice(choice.index, Delta(), finish_reason=choice.finish))

    def spent(self, usage: Usage) -> ChatChunk:
        """Return the chunk of the usage."""
        chunk = self._chunk()
        chunk.usage = usage
        return chunk

    def _chunk(self, *choices: ChatChunkChoice) -> ChatChunk:
        return ChatChunk(self.id, self.created, self.model, list(choices), self.fingerprint)

    def _told(self, pieces: Sequence[Piece]) -> ChatLogprobs | None:
        if self.logprobs is None:
            return None
        return ChatLogprobs([self.logprobs.chat(piece.token) for piece in pieces if piece.token is not None])
