"""What is computed for whole inputs: classes, vectors and scores, in the shapes of vLLM and OpenAI."""

import base64
import secrets
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from anyio.to_thread import run_sync
from starlette.requests import Request
from starlette.responses import Response
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from loradeck.api import generate
from loradeck.api.auth import ApiKey
from loradeck.api.errors import HttpError, shutting_down
from loradeck.api.requests import (
    AdapterRequest,
    ClassifyRequest,
    EmbeddingRequest,
    InputRequest,
    PoolingRequest,
    ScoreRequest,
    TokenizeRequest,
    read_body,
)
from loradeck.api.responses import (
    Classification,
    Embedding,
    Pooled,
    ResultList,
    Score,
    json_response,
)
from loradeck.api.state import ServerState, state_of
from loradeck.api.streaming import run_until_disconnect
from loradeck.api.tokenization import encode_messages, encode_prompts
from loradeck.errors import BusyError
from loradeck.pooling import probabilities
from loradeck.runner.pooling_runner import PoolingRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from loradeck.serve.pooling_result import PoolingResult

Encode: TypeAlias = "Callable[[PreTrainedTokenizerBase], list[PoolingRow]]"
VLLM_TASKS = {"classify": "classify", "tokens": "token_classify", "reward": "classify", "embed": "embed"}


async def classify(request: Request) -> Response:
    """Return the probabilities of each input's labels."""
    state = state_of(request)
    body = await read_body(request, ClassifyRequest, state.config.max_body_bytes)
    results, outputs = await _compute(request, body, partial(_rows, body))
    data = []
    for index, (result, logits) in enumerate(zip(results, outputs, strict=True)):
        probs = _activated(state, logits, body.use_activation)
        names = _label_names(state, result, len(probs))
        data.append(Classification(index, names[int(probs.argmax())], probs.tolist(), len(probs)))
    return _response("classify", state, body, results, data)


async def create_embeddings(request: Request) -> Response:
    """Return each input's vector."""
    state = state_of(request)
    body = await read_body(request, EmbeddingRequest, state.config.max_body_bytes)
    _check_dimensions(state, body.dimensions)
    results, outputs = await _compute(request, body, partial(_rows, body))
    data = [Embedding(index, _vector(state, body, output)) for index, output in enumerate(outputs)]
    return _response("embd", state, body, results, data)


async def pool(request: Request) -> Response:
    """Return what the base computes for each input: a vector, or what its head says of it or of each token."""
    state = state_of(request)
    body = await read_body(request, PoolingRequest, state.config.max_body_bytes)
    task = VLLM_TASKS[state.engine.base.task]
    if body.task not in (None, task):
        raise HttpError(400, f"This server's base does {task}, not {body.task!r:.40}.", param="task")
    embeds = state.engine.base.task == "embed"
    if embeds and body.use_activation is not None:
        raise HttpError(400, "A vector has no activation.", param="use_activation")
    _check_dimensions(state, body.dimensions)
    results, outputs = await _compute(request, body, partial(_rows, body))
    if not embeds:
        outputs = [_activated(state, output, body.use_activation) for output in outputs]
    data = [Pooled(index, _vector(state, body, output)) for index, output in enumerate(outputs)]
    return _response("pool", state, body, results, data)


async def score(request: Request) -> Response:
    """Return a score for each pair of texts: that of a head with one label, or the cosine of two vectors."""
    state = state_of(request)
    body = await read_body(request, ScoreRequest, state.config.max_body_bytes)
    embeds = state.engine.base.task == "embed"
    if embeds and body.use_activation is not None:
        raise HttpError(400, "A cosine has no activation.", param="use_activation")
    pairs = _pairs(body)
    results, outputs = await _compute(request, body, partial(_pair_rows, pairs, embeds))
    if embeds:
        firsts, seconds = outputs[: len(pairs)], outputs[len(pairs) :]
        scores = [float(cosine_similarity(a, b, dim=0)) for a, b in zip(firsts, seconds, strict=True)]
    else:
        scores = [_score(state, output, body.use_activation) for output in outputs]
    data = [Score(index, value) for index, value in enumerate(scores)]
    return _response("score", state, body, results, data)


async def score_v1(request: Request) -> Response:
    """Do the same under vLLM's other path."""
    return await score(request)


# ---- to the engine


async def _compute(
    request: Request, body: AdapterRequest, encode: Encode
) -> "tuple[list[PoolingResult], list[Tensor]]":
    """Return what the engine computes for the rows that `encode` makes of a request.

    Raises:
        HttpError: 400, too many rows; 404, an unknown adapter; 503, the server is shutting down.
        LoradeckError: the engine refuses a row, or cannot compute it.
    """
    state = state_of(request)
    results = await run_sync(_submit, state, request.state.key, body, encode)
    request.state.generations, request.state.n = results, 1  # for the log

    async def output(result: "PoolingResult") -> Tensor:
        return await result

    try:
        return results, await run_until_disconnect(request.receive, *map(output, results))
    except BusyError as error:
        raise shutting_down() from error
    finally:
        state.release(results)


def _submit(state: ServerState, key: ApiKey, body: AdapterRequest, encode: Encode) -> "list[PoolingResult]":
    selection = generate.select_adapters(state, key, body)
    model = generate.resolve(state, key, selection)
    rows = encode(model.tokenizer)
    if len(rows) > state.config.max_inputs:
        raise HttpError(400, f"{len(rows)} inputs exceed the limit of {state.config.max_inputs}.", param="input")
    longest = max(len(row.tokens) for row in rows)
    if longest > state.config.max_prompt:
        raise HttpError(400, f"An input has {longest} tokens; the limit is {state.config.max_prompt}.", param="input")
    try:
        results = state.pooler.submit(rows, model, tenant=key.name, adapter=selection.label)
    except BusyError as error:
        if state.shutting_down:
            raise shutting_down() from error
        raise
    state.live.update(results)
    return results


def _rows(body: InputRequest, tokenizer: "PreTrainedTokenizerBase") -> list[PoolingRow]:
    if (body.input is None) == (body.messages is None):
        raise HttpError(400, "Give either input or messages.", param="input")
    if body.messages is not None:
        messages = TokenizeRequest(
            messages=body.messages,
            add_generation_prompt=bool(body.add_generation_prompt),
            continue_final_message=body.continue_final_message,
            chat_template_kwargs=body.chat_template_kwargs,
        )
        return [PoolingRow(encode_messages(tokenizer, messages))]
    special = body.add_special_tokens is not False
    return [PoolingRow(ids) for ids in encode_prompts(tokenizer, body.input, special=special, param="input")]


def _pairs(body: ScoreRequest) -> list[tuple[str, str]]:
    """Return the texts to compare.

    Raises:
        HttpError: 400, some are missing, or their numbers do not fit.
    """
    firsts, seconds = body.text_1 or body.queries, body.text_2 or body.documents
    if firsts is None or seconds is None:
        raise HttpError(400, "Give text_1 and text_2.", param="text_1" if firsts is None else "text_2")
    ones = [firsts] if isinstance(firsts, str) else firsts
    others = [seconds] if isinstance(seconds, str) else seconds
    if len(ones) == 1:
        ones *= len(others)
    if len(ones) != len(others):
        raise HttpError(400, f"{len(ones)} and {len(others)} texts; the first may be one for all.", param="text_2")
    return [*zip(ones, others, strict=True)]


def _pair_rows(pairs: Sequence[tuple[str, str]], embeds: bool, tokenizer: Any) -> list[PoolingRow]:
    """Return a row for each pair; of a base that embeds, one for each first text, then one for each second."""
    if embeds:
        return [PoolingRow(tokenizer(pair[place])["input_ids"]) for place in (0, 1) for pair in pairs]
    encodings = [tokenizer(*pair) for pair in pairs]
    return [PoolingRow(each["input_ids"], each.get("token_type_ids", ())) for each in encodings]


# ---- from the engine


def _response(
    kind: str, state: ServerState, body: AdapterRequest, results: "Sequence[PoolingResult]", data: list[Any]
) -> Response:
    name, model = f"{kind}-{secrets.token_hex(16)}", body.model or state.names.base
    return json_response(ResultList(name, int(time.time()), model, data, generate.usage_of(results, 1)))


def _activated(state: ServerState, logits: Tensor, use_activation: bool | None) -> Tensor:
    """Return what a head says as a client wants it: a reward as it is by default, else probabilities."""
    base = state.engine.base
    activate = base.task != "reward" if use_activation is None else use_activation
    return probabilities(logits, base.model.config) if activate else logits


def _score(state: ServerState, logits: Tensor, use_activation: bool | None) -> float:
    if len(logits) != 1:
        message = f"This model's head has {len(logits)} labels; a score needs a head of one."
        raise HttpError(400, message, param="model")
    return float(_activated(state, logits, use_activation))


def _label_names(state: ServerState, result: "PoolingResult", count: int) -> Sequence[str]:
    """Return the names of a result's labels: the adapter's, else the base's, else numbers."""
    names: Any = state.engine.base.model.config.id2label or {}
    for labels in (result.labels, [name for _, name in sorted(names.items())]):
        if len(labels) == count:
            return labels
    return [f"LABEL_{number}" for number in range(count)]


def _vector(state: ServerState, body: EmbeddingRequest, values: Tensor) -> Any:
    """Return a result as JSON, cut to the dimensions that the client wants."""
    pooling = state.engine.base.pooling
    if body.dimensions is not None and body.dimensions < len(values):
        values = values[: body.dimensions]
        values = normalize(values, dim=0) if pooling is not None and pooling.normalize else values
    if body.encoding_format == "base64":
        return base64.b64encode(values.numpy().astype(np.dtype("<f4")).tobytes()).decode()
    return values.tolist()


def _check_dimensions(state: ServerState, dimensions: int | None) -> None:
    """Check that vectors may be cut to so many dimensions.

    Raises:
        HttpError: 400.
    """
    base = state.engine.base
    config = base.model.config.get_text_config()
    if dimensions is None or (base.task == "embed" and dimensions == config.hidden_size):
        return
    allowed = getattr(config, "matryoshka_dimensions", None)
    if base.task != "embed" or not (allowed or getattr(config, "is_matryoshka", False)):
        raise HttpError(400, f"{base.name} was not trained for vectors that are cut.", param="dimensions")
    if dimensions > config.hidden_size or (allowed and dimensions not in allowed):
        sizes = ", ".join(map(str, allowed)) if allowed else f"1 to {config.hidden_size}"
        raise HttpError(400, f"{base.name} has vectors of {sizes} dimensions, not {dimensions}.", param="dimensions")
