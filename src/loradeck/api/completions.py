"""`POST /v1/completions`: continues texts or token ids, and scores prompts for lm-eval."""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from anyio.to_thread import run_sync
from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from loradeck.api import generate
from loradeck.api.auth import ApiKey
from loradeck.api.logprobs import LogprobFormatter, formatter_of
from loradeck.api.requests import CompletionRequest, read_body
from loradeck.api.responses import CompletionChoice, CompletionLogprobs, TextCompletion, Usage
from loradeck.api.state import ServerState, state_of
from loradeck.api.streaming import EventStream
from loradeck.api.tokenization import encode_prompts

if TYPE_CHECKING:
    from loradeck.api.generate import FinishedGeneration
    from loradeck.serve.generation import Generation, TextChunk

DEFAULT_MAX_TOKENS = 16  # OpenAI's


async def create_completion(request: Request) -> Response | EventStream:
    """Continue a prompt, or several."""
    state = state_of(request)
    body = await read_body(request, CompletionRequest, state.config.max_body_bytes)
    generations, echoes, logprobs = await run_sync(_submit, state, request.state.key, body)
    form = CompletionFormat(body, body.model or state.names.base, state.fingerprint, logprobs, echoes)
    return await generate.respond(request, body, generations, form)


def _submit(
    state: ServerState, key: ApiKey, body: CompletionRequest
) -> "tuple[list[Generation], list[str], LogprobFormatter]":
    """Return the generations, for each the text of its prompt if the answer repeats it, and the form of its tokens."""
    selection = generate.select_adapters(state, key, body)
    model = generate.resolve(state, key, selection)
    generate.check_tokens(state, body, model)
    prompts = encode_prompts(model.tokenizer, body.prompt, special=body.add_special_tokens is not False)
    requested = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    prompt_logprobs = body.logprobs if body.echo else None
    params = [
        generate.sampling_params(body, generate.max_tokens(state, prompt, requested), body.logprobs, prompt_logprobs)
        for prompt in prompts
    ]
    n = body.n or 1
    logprobs = formatter_of(model.tokenizer)
    echoes = _texts(logprobs, body, prompts) if body.echo else [""] * len(prompts)
    generations = generate.submit(state, key, selection, model, prompts, params, n, continues=True)
    return generations, [echo for echo in echoes for _ in range(n)], logprobs


def _texts(logprobs: LogprobFormatter, body: CompletionRequest, prompts: list[list[int]]) -> list[str]:
    """Return the text of each prompt: as the client wrote it, or decoded from its token ids."""
    sources = [body.prompt] if isinstance(body.prompt, str) else body.prompt[: len(prompts)]
    return [
        source if isinstance(source, str) else logprobs.text(ids) for source, ids in zip(sources, prompts, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class CompletionFormat:
    """The JSON of completions."""

    request: CompletionRequest
    model: str
    fingerprint: str
    logprobs: LogprobFormatter
    echoes: Sequence[str]
    """For each choice, the text before the answer."""
    id: str = field(default_factory=lambda: f"cmpl-{secrets.token_hex(16)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def response(self, answers: "Sequence[FinishedGeneration]", usage: Usage) -> TextCompletion:
        """Return the completion."""
        choices = [
            CompletionChoice(
                index,
                self.echoes[index] + generate.text_of(chunks),
                self._logprobs(index, chunks, generation if self.request.echo else None),
                generate.finish_reason(generation),
                generate.token_ids(self.request, chunks),
                generate.prompt_token_ids(self.request, generation),
            )
            for index, (generation, chunks) in enumerate(answers)
        ]
        return self._completion(*choices, usage=usage)

    def first_event(self, index: int, generation: "Generation") -> TextCompletion | None:
        """Return the event with the prompt, if it is echoed, or its tokens are asked for."""
        if not self.request.echo and not self.request.return_token_ids:
            return None
        choice = CompletionChoice(index, self.echoes[index])
        if self.request.echo:
            choice.logprobs = self._logprobs(index, [], generation)
        choice.token_ids = generate.token_ids(self.request, [])
        choice.prompt_token_ids = generate.prompt_token_ids(self.request, generation)
        return self._completion(choice)

    def chunk_event(self, index: int, chunk: "TextChunk") -> TextCompletion | None:
        """Return the event with a chunk's text."""
        if not chunk.text and self.request.logprobs is None and not self.request.return_token_ids:
            return None
        choice = CompletionChoice(index, chunk.text, self._logprobs(index, [chunk]))
        choice.token_ids = generate.token_ids(self.request, [chunk])
        return self._completion(choice)

    def last_event(self, index: int, generation: "Generation") -> TextCompletion:
        """Return the event with the finish reason."""
        return self._completion(CompletionChoice(index, "", finish_reason=generate.finish_reason(generation)))

    def usage_event(self, usage: Usage) -> TextCompletion:
        """Return the event with the usage."""
        return self._completion(usage=usage)

    def _completion(self, *choices: CompletionChoice, usage: Usage | UnsetType = UNSET) -> TextCompletion:
        return TextCompletion(self.id, self.created, self.model, list(choices), self.fingerprint, usage)

    def _logprobs(
        self, index: int, chunks: "Sequence[TextChunk]", echoed: "Generation | None" = None
    ) -> CompletionLogprobs | None:
        """Return the log-probabilities of some chunks, after those of the prompt of `echoed`."""
        if self.request.logprobs is None:
            return None
        echo = self.echoes[index]
        tokens = [chunk.token for chunk in chunks if chunk.token]
        offsets = [len(echo) + chunk.offset for chunk in chunks if chunk.token]
        if echoed is not None:
            tokens = echoed.prompt + tokens
            offsets = self.logprobs.offsets(echoed.request.prompt, echo) + offsets
        return self.logprobs.completion(tokens, offsets)
