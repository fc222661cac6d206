"""`POST /v1/chat/completions`: answers a conversation."""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from anyio.to_thread import run_sync
from starlette.requests import Request
from starlette.responses import Response

from loradeck.api import generate
from loradeck.api.auth import ApiKey
from loradeck.api.errors import HttpError
from loradeck.api.logprobs import LogprobFormatter, formatter_of
from loradeck.api.requests import ChatCompletionRequest, read_body
from loradeck.api.responses import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatLogprobs,
    MessageDelta,
    Usage,
)
from loradeck.api.state import ServerState, state_of
from loradeck.api.streaming import EventStream
from loradeck.api.tokenization import encode_messages

if TYPE_CHECKING:
    from loradeck.api.generate import FinishedGeneration
    from loradeck.serve.generation import Generation, TextChunk


async def create_chat_completion(request: Request) -> Response | EventStream:
    """Answer a conversation."""
    state = state_of(request)
    body = await read_body(request, ChatCompletionRequest, state.config.max_body_bytes)
    generations, logprobs = await run_sync(_submit, state, request.state.key, body)
    form = ChatFormat(body, body.model or state.names.base, state.fingerprint, logprobs if body.logprobs else None)
    return await generate.respond(request, body, generations, form)


def _submit(
    state: ServerState, key: ApiKey, body: ChatCompletionRequest
) -> "tuple[list[Generation], LogprobFormatter]":
    selection = generate.select_adapters(state, key, body)
    if body.top_logprobs and not body.logprobs:
        raise HttpError(400, "top_logprobs requires logprobs=true.", param="top_logprobs")
    model = generate.resolve(state, key, selection)
    generate.check_tokens(state, body, model)
    prompt = encode_messages(model.tokenizer, body)
    requested = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    params = generate.sampling_params(body, generate.max_tokens(state, prompt, requested), logprobs)
    continues = bool(body.continue_final_message)
    generations = generate.submit(state, key, selection, model, [prompt], [params], body.n or 1, continues=continues)
    return generations, formatter_of(model.tokenizer)


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """The JSON of chat completions."""

    request: ChatCompletionRequest
    model: str
    fingerprint: str
    logprobs: LogprobFormatter | None
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(16)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def response(self, answers: "Sequence[FinishedGeneration]", usage: Usage) -> ChatCompletion:
        """Return the completion."""
        choices = [
            ChatChoice(
                index,
                AssistantMessage(generate.text_of(chunks)),
                self._logprobs(chunks),
                generate.finish_reason(generation),
                generate.token_ids(self.request, chunks),
            )
            for index, (generation, chunks) in enumerate(answers)
        ]
        prompt = generate.prompt_token_ids(self.request, answers[0][0])
        return ChatCompletion(self.id, self.created, self.model, choices, usage, self.fingerprint, prompt)

    def first_event(self, index: int, generation: "Generation") -> ChatCompletionChunk:
        """Return the event with the role."""
        event = self._event(ChatChunkChoice(index, MessageDelta("assistant", "")))
        event.prompt_token_ids = generate.prompt_token_ids(self.request, generation)
        return event

    def chunk_event(self, index: int, chunk: "TextChunk") -> ChatCompletionChunk | None:
        """Return the event with a chunk's text."""
        if not chunk.text and self.logprobs is None and not self.request.return_token_ids:
            return None
        choice = ChatChunkChoice(index, MessageDelta(content=chunk.text), self._logprobs([chunk]))
        choice.token_ids = generate.token_ids(self.request, [chunk])
        return self._event(choice)

    def last_event(self, index: int, generation: "Generation") -> ChatCompletionChunk:
        """Return the event with the finish reason."""
        return self._event(ChatChunkChoice(index, MessageDelta(), finish_reason=generate.finish_reason(generation)))

    def usage_event(self, usage: Usage) -> ChatCompletionChunk:
        """Return the event with the usage."""
        event = self._event()
        event.usage = usage
        return event

    def _event(self, *choices: ChatChunkChoice) -> ChatCompletionChunk:
        return ChatCompletionChunk(self.id, self.created, self.model, list(choices), self.fingerprint)

    def _logprobs(self, chunks: "Sequence[TextChunk]") -> ChatLogprobs | None:
        if self.logprobs is None:
            return None
        return ChatLogprobs([self.logprobs.chat(chunk.token) for chunk in chunks if chunk.token is not None])
