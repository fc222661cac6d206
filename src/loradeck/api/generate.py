"""What both kinds of generation share: submitting a request to the engine, and responding, whole or as a stream."""

import difflib
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import msgspec
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from loradeck.api.auth import ApiKey
from loradeck.api.errors import HttpError, error_info, invalid_field, shutting_down
from loradeck.api.model_name import AdapterSelection
from loradeck.api.requests import AdapterRequest, GenerationRequest
from loradeck.api.responses import (
    ErrorResponse,
    FinishReason,
    PromptTokensDetails,
    TokenIds,
    Usage,
    json_response,
)
from loradeck.api.state import ServerState, state_of
from loradeck.api.streaming import EventStream, SendEvent, run_until_disconnect
from loradeck.errors import BusyError, UnknownAdapterError
from loradeck.sampling import SamplingParams

if TYPE_CHECKING:
    from loradeck.serve.generation import Generation, TextChunk
    from loradeck.serve.pooling_result import PoolingResult
    from loradeck.serve.served_model import ServedModel

    FinishedGeneration: TypeAlias = tuple[Generation, Sequence[TextChunk]]

SEEDS = 2**64
MAX_NAME = 128  # characters of an unknown name that are compared
SAMPLING_FIELDS = (  # those that GenerationRequest and SamplingParams share
    "min_tokens",
    "temperature",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "seed",
    "stop",
    "ignore_eos",
)


class Format(Protocol):
    """The JSON of one route's responses. A choice is one answer, `index` its position among them."""

    def response(self, answers: "Sequence[FinishedGeneration]", usage: Usage) -> Any:
        """Return the body of a response that is not streamed."""
        ...

    def first_event(self, index: int, generation: "Generation", /) -> Any:
        """Return a choice's first event, or None."""
        ...

    def chunk_event(self, index: int, chunk: "TextChunk") -> Any:
        """Return the event of a chunk, or None if there is nothing to send."""
        ...

    def last_event(self, index: int, generation: "Generation") -> Any:
        """Return a choice's last event."""
        ...

    def usage_event(self, usage: Usage) -> Any:
        """Return the event with the usage of all choices."""
        ...


# ---- to the engine


def select_adapters(state: ServerState, key: ApiKey, request: AdapterRequest) -> AdapterSelection:
    """Return the adapters of a request; may read the disk.

    Raises:
        HttpError: 400 or 404, as `ModelNames.select`; 403, the key may not use them.
    """
    selection = state.names.select(request)
    state.check_adapters(key, selection.names)
    return selection


def resolve(state: ServerState, key: ApiKey, selection: AdapterSelection) -> "ServedModel":
    """Return the adapters of a selection as they are now, with their tokenizer; reads the disk.

    Raises:
        HttpError: 404, an unknown adapter.
        LoradeckError: the engine refuses one.
    """
    try:
        return state.engine.resolve(selection.entry)
    except UnknownAdapterError as error:
        raise _unknown_adapter(state, key, selection, error) from error


def check_tokens(state: ServerState, request: GenerationRequest, model: "ServedModel") -> None:
    """Check the token ids of a request, besides its prompt's.

    Raises:
        HttpError: 400 with the field's name, an unknown id.
    """
    for field in ("logit_bias", "stop_token_ids"):
        with invalid_field(field):
            state.engine.check_tokens(getattr(request, field) or (), model)


def max_tokens(state: ServerState, prompt: Sequence[int], requested: int | None) -> int:
    """Return how many tokens the answer to a prompt may have: as many as requested, within the limits.

    If nothing is requested, as many as the server's configuration, or else the base's, says; or else all that fit.

    Raises:
        HttpError: 400, the prompt leaves no room in the base's context.
    """
    context = state.engine.base.context
    room = state.config.max_output if context is None else context - len(prompt)
    if room < 1 and requested != 0:
        message = (
            f"The prompt has {len(prompt)} tokens; with the answer, at most {context} fit into the base's context."
        )
        raise HttpError(400, message, param="prompt")
    if requested is None:
        settings = state.engine.base.model.generation_config
        requested = state.config.default_max_tokens or getattr(settings, "max_new_tokens", None) or room
    return min(room, state.config.max_output, requested)


def sampling_params(
    request: GenerationRequest, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None = None
) -> SamplingParams:
    """Return the engine's parameters of a request, with OpenAI's defaults.

    Raises:
        HttpError: 400, `min_tokens` is above `max_tokens`.
    """
    fields: dict[str, Any] = {"temperature": 1.0}
    fields |= {name: value for name in SAMPLING_FIELDS if (value := getattr(request, name)) is not None}
    with invalid_field("min_tokens"):  # the only one that the request's own types leave open
        return SamplingParams(
            max_tokens=max_tokens,
            top_k=max(request.top_k or 0, 0),
            stop_token_ids=frozenset(request.stop_token_ids or ()),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            **fields,
        )


def submit(
    state: ServerState,
    key: ApiKey,
    selection: AdapterSelection,
    model: "ServedModel",
    prompts: Sequence[list[int]],
    params: Sequence[SamplingParams],
    n: int,
    *,
    continues: bool,
) -> "list[Generation]":
    """Submit `n` requests for each prompt to the engine: all or none.

    `selection` is what the client asked for, `model` what it is. `continues` says whether the answers continue the text
    of their prompts or are texts of their own.

    Raises:
        HttpError: 400, too many answers, or an empty or too long prompt; 503, the server is shutting down.
        LoradeckError: the engine rejects a request.
    """
    if len(prompts) * n > state.config.max_choices:
        message = f"{len(prompts)} prompts times n={n} exceed the limit of {state.config.max_choices} answers."
        raise HttpError(400, message, param="n")
    if not all(prompts):
        raise HttpError(400, "The prompt is empty.", param="prompt")
    longest = max(map(len, prompts))
    if longest > state.config.max_prompt:
        message = f"A prompt has {longest} tokens; the limit is {state.config.max_prompt}."
        raise HttpError(400, message, param="prompt")
    generations: list[Generation] = []
    try:
        for prompt, prompt_params in zip(prompts, params, strict=True):
            for number in range(n):
                generation = state.generator.submit(
                    prompt,
                    model,
                    _with_seed(prompt_params, number),
                    tenant=key.name,
                    adapter=selection.label,
                    continues=continues,
                )
                state.live.add(generation)
                generations.append(generation)
    except BaseException as error:
        state.release(generations)
        if state.shutting_down and isinstance(error, BusyError):
            raise shutting_down() from error
        raise
    return generations


def _unknown_adapter(
    state: ServerState, key: ApiKey, selection: AdapterSelection, error: UnknownAdapterError
) -> HttpError:
    """Return a 404 that names the adapters of a similar name that the key may use."""
    names = {name for name in (state.engine.store.names() if state.engine.store else ()) if key.may_use(name)}
    unknown = [name for name in selection.names if name not in names]
    close = [name for word in unknown for name in difflib.get_close_matches(word[:MAX_NAME], names)]
    hint = f"Did you mean {' or '.join(close[:3])}?" if close else "GET /v1/models lists the models."
    return HttpError(404, error.message, param="model", hint=hint)


def _with_seed(params: SamplingParams, number: int) -> SamplingParams:
    """Return the parameters of one of the answers to a prompt: each has its own seed."""
    return params if params.seed is None else replace(params, seed=(params.seed + number) % SEEDS)


# ---- from the engine


async def respond(
    request: Request, body: GenerationRequest, generations: "Sequence[Generation]", form: Format
) -> Response | EventStream:
    """Return the response to a request; the generations are released when it is sent or the client disconnects."""
    state = state_of(request)
    n = body.n or 1
    request.state.generations, request.state.n = generations, n  # for the log
    if body.stream:
        include_usage = body.stream_options is not None and body.stream_options.include_usage

        def usage_data() -> bytes:
            return msgspec.json.encode(form.usage_event(usage_of(generations, n))) if include_usage else b""

        def error_data(error: Exception) -> bytes:
            request.state.error = error  # for the log
            info, _ = error_info(error, state.store_path)
            return msgspec.json.encode(ErrorResponse(info))

        return EventStream(
            [partial(_write_events, form, index, generation) for index, generation in enumerate(generations)],
            last=usage_data,
            on_error=error_data,
            close=partial(state.release, generations),
            ping=state.config.ping,
        )
    try:
        answers = await run_until_disconnect(request.receive, *map(_read_all, generations))
    finally:
        state.release(generations)
    return json_response(form.response(answers, usage_of(generations, n)))


def text_of(chunks: "Iterable[TextChunk]") -> str:
    """Return the text of some chunks."""
    return "".join(chunk.text for chunk in chunks)


def token_ids(request: GenerationRequest, chunks: "Iterable[TextChunk]") -> TokenIds:
    """Return the tokens of some chunks, with the one that ends the answer, if the request asks for them."""
    if not request.return_token_ids:
        return UNSET
    return [chunk.token.id for chunk in chunks if chunk.token is not None]


def prompt_token_ids(request: GenerationRequest, generation: "Generation") -> TokenIds:
    """Return the tokens of a prompt, if the request asks for them."""
    return [*generation.request.prompt] if request.return_token_ids else UNSET


def finish_reason(generation: "Generation") -> FinishReason:
    """Return why a generation ended; those that failed or were cancelled have raised an error before."""
    assert generation.finish in ("stop", "length")
    return generation.finish


async def _read(generation: "Generation") -> "AsyncIterator[TextChunk]":
    """Yield the chunks of a generation.

    Raises:
        LoradeckError: the request failed.
        HttpError: 503, the engine cancelled it because the server is shutting down.
    """
    async for chunk in generation.chunks():
        yield chunk
    if generation.finish == "cancelled":
        raise shutting_down()


async def _read_all(generation: "Generation") -> "FinishedGeneration":
    return generation, [chunk async for chunk in _read(generation)]


async def _write_events(form: Format, index: int, generation: "Generation", send_event: SendEvent) -> None:
    async def send(event: Any) -> None:
        if event is not None:
            await send_event(msgspec.json.encode(event))

    started = False
    async for chunk in _read(generation):
        if not started:  # not earlier: an error before the first token gets its own status
            started = True
            await send(form.first_event(index, generation))
        await send(form.chunk_event(index, chunk))
    if not started:
        await send(form.first_event(index, generation))
    await send(form.last_event(index, generation))


def usage_of(generations: "Sequence[Generation | PoolingResult]", n: int) -> Usage:
    """Return the tokens of a request; a prompt with `n` answers counts once."""
    requests = [generation.request for generation in generations]
    prompt_tokens = sum(len(request.prompt) for request in requests[::n])
    completion_tokens = sum(request.generated for request in requests)
    cached_tokens = sum(request.cached for request in requests[::n])
    total_tokens = prompt_tokens + completion_tokens
    return Usage(prompt_tokens, completion_tokens, total_tokens, PromptTokensDetails(cached_tokens))
