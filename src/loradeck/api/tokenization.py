"""Text to token ids and back: the prompts of requests, and the routes that show the tokenizer."""

import inspect
import json
from typing import TYPE_CHECKING, Any, cast

import msgspec
from anyio.to_thread import run_sync
from starlette.requests import Request
from starlette.responses import Response

from loradeck.api.errors import HttpError, invalid_field
from loradeck.api.requests import (
    ChatCompletionRequest,
    ChatMessage,
    DetokenizeRequest,
    TokenizeRequest,
    read_body,
)
from loradeck.api.responses import DetokenizeResponse, TokenizeResponse, TokenizerInfo, json_response
from loradeck.api.state import ServerState, state_of
from loradeck.base.text import check_ids, encode_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# ---- routes


async def tokenize(request: Request) -> Response:
    """Return the token ids of a text, or of messages."""
    state = state_of(request)
    body = await read_body(request, TokenizeRequest, state.config.max_body_bytes)
    return json_response(await run_sync(_tokenize, state, body))


async def detokenize(request: Request) -> Response:
    """Return the text of token ids."""
    state = state_of(request)
    body = await read_body(request, DetokenizeRequest, state.config.max_body_bytes)
    return json_response(await run_sync(_detokenize, state, body))


async def tokenizer_info(request: Request) -> Response:
    """Return the tokenizer's special tokens and its chat template."""
    tokenizer = state_of(request).engine.base.tokenizer
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None  # some have several
    return json_response(TokenizerInfo(tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token, template))


def _tokenize(state: ServerState, body: TokenizeRequest) -> TokenizeResponse:
    base = state.engine.base
    if (body.prompt is None) == (body.messages is None):
        raise HttpError(400, "Give either a prompt or messages.", param="prompt")
    if body.prompt is None:
        ids = encode_messages(base.tokenizer, body)
    else:
        ids = encode_text(base.tokenizer, body.prompt, special=body.add_special_tokens is not False)
    return TokenizeResponse(len(ids), base.context, ids)


def _detokenize(state: ServerState, body: DetokenizeRequest) -> DetokenizeResponse:
    tokenizer = state.engine.base.tokenizer
    with invalid_field("tokens"):
        return DetokenizeResponse(str(tokenizer.decode(check_ids(tokenizer, body.tokens))))


# ---- prompts


def encode_prompts(tokenizer: "PreTrainedTokenizerBase", prompt: object, *, special: bool = True) -> list[list[int]]:
    """Return the token ids of each prompt in `prompt`: a text, a list of texts, token ids, or lists of token ids.

    Raises:
        HttpError: 400, a mixture of these, or an unknown token id.
    """
    with invalid_field("prompt"):
        match prompt:
            case str():
                return [encode_text(tokenizer, prompt, special=special)]
            case [*parts] if all(isinstance(part, str) for part in parts):
                return [encode_text(tokenizer, str(part), special=special) for part in parts]
            case [*parts] if all(isinstance(part, int) for part in parts):
                return [check_ids(tokenizer, cast("list[int]", parts))]
            case [*parts] if all(isinstance(part, list) for part in parts):
                return [check_ids(tokenizer, part) for part in parts]
    raise HttpError(
        400, "prompt must be a text, a list of texts, token ids, or a list of lists of token ids.", param="prompt"
    )


def encode_text(tokenizer: "PreTrainedTokenizerBase", text: str, *, special: bool = True) -> list[int]:
    """Return the token ids of a plain text; `special` adds what the tokenizer puts around it."""
    return cast("list[int]", tokenizer(text, add_special_tokens=special)["input_ids"])


def encode_messages(
    tokenizer: "PreTrainedTokenizerBase", request: ChatCompletionRequest | TokenizeRequest
) -> list[int]:
    """Return the token ids of a conversation, up to where the answer begins.

    Raises:
        HttpError: 400, the base has no chat template, or the template rejects the messages or ignores the tools.
    """
    variables = request.chat_template_kwargs or {}
    reserved = variables.keys() & inspect.signature(tokenizer.apply_chat_template).parameters
    if reserved:  # among them `chat_template`, a program of the client's own
        raise HttpError(400, f"{min(reserved)} is not a variable of the template.", param="chat_template_kwargs")
    extend = bool(request.continue_final_message)
    begin = not extend if request.add_generation_prompt is None else request.add_generation_prompt
    if extend and begin:
        raise HttpError(
            400,
            "continue_final_message and add_generation_prompt contradict each other.",
            param="continue_final_message",
            hint="Set one of them to false.",
        )
    settings = {**variables, "add_generation_prompt": begin, "continue_final_message": extend}
    messages = [_template_message(message) for message in request.messages or ()]
    tools = request.tools if getattr(request, "tool_choice", None) != "none" else None
    with invalid_field("messages"):
        ids = encode_chat(tokenizer, messages, tools or None, **settings)
        tools_ignored = bool(tools) and ids == encode_chat(tokenizer, messages, None, **settings)
    if tools_ignored:
        raise HttpError(400, "The base's chat template ignores tools.", param="tools")
    return ids


def _template_message(message: ChatMessage) -> dict[str, Any]:
    """Return a message as chat templates read it: its content one text, the arguments of its tool calls objects."""
    fields = {name: value for name, value in msgspec.structs.asdict(message).items() if value is not None}
    content = message.content or ""
    fields["content"] = content if isinstance(content, str) else "\n".join(part.text for part in content)  # as vLLM
    if message.tool_calls is not None:
        fields["tool_calls"] = [_template_call(call) for call in message.tool_calls]
    return fields


def _template_call(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        return {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}
    except (ValueError, RecursionError) as error:
        raise HttpError(400, f"Invalid JSON in the arguments of a tool call: {error}", param="messages") from error
