"""Text to token ids and back: the prompts of requests, and the routes that show the tokenizer."""

import inspect
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from anyio.to_thread import run_sync
from starlette.requests import Request
from starlette.responses import Response

from loradeck.api import generate
from loradeck.api.auth import ApiKey
from loradeck.api.errors import HttpError, invalid_field
from loradeck.api.requests import (
    ChatCompletionRequest,
    ChatMessage,
    DetokenizeRequest,
    ModelQuery,
    TokenizeRequest,
    ToolCall,
    read_body,
    read_query,
)
from loradeck.api.responses import DetokenizeResponse, TokenizeResponse, TokenizerInfo, json_response
from loradeck.api.state import ServerState, state_of
from loradeck.base.chat_template import PLAIN_ROLES, TEMPLATE_ROLES, encode_chat, ignored_tools, reads_role
from loradeck.base.text import check_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = (*PLAIN_ROLES, *TEMPLATE_ROLES, "tool")


# ---- routes


async def tokenize(request: Request) -> Response:
    """Return the token ids of a text, or of messages."""
    state = state_of(request)
    body = await read_body(request, TokenizeRequest, state.config.max_body_bytes)
    return json_response(await run_sync(_tokenize, state, request.state.key, body))


async def detokenize(request: Request) -> Response:
    """Return the text of token ids."""
    state = state_of(request)
    body = await read_body(request, DetokenizeRequest, state.config.max_body_bytes)
    return json_response(await run_sync(_detokenize, state, request.state.key, body))


async def tokenizer_info(request: Request) -> Response:
    """Return the special tokens and the chat template of a model's tokenizer."""
    model = read_query(request, ModelQuery).model
    tokenizer = await run_sync(_tokenizer, state_of(request), request.state.key, model)
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None  # some have several
    return json_response(TokenizerInfo(tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token, template))


def _tokenizer(state: ServerState, key: ApiKey, model: str | None) -> "PreTrainedTokenizerBase":
    """Return the tokenizer of what a request names. Reads the disk."""
    selection = state.names.named(model)
    state.check_adapters(key, selection.names)
    return generate.resolve(state, key, selection).tokenizer


def _tokenize(state: ServerState, key: ApiKey, body: TokenizeRequest) -> TokenizeResponse:
    tokenizer = _tokenizer(state, key, body.model)
    if (body.prompt is None) == (body.messages is None):
        raise HttpError(400, "Give either a prompt or messages.", param="prompt")
    if body.prompt is None:
        ids = encode_messages(tokenizer, body)
    else:
        ids = encode_text(tokenizer, body.prompt, special=body.add_special_tokens is not False)
    return TokenizeResponse(len(ids), state.engine.base.context, ids)


def _detokenize(state: ServerState, key: ApiKey, body: DetokenizeRequest) -> DetokenizeResponse:
    tokenizer = _tokenizer(state, key, body.model)
    with invalid_field("tokens"):
        return DetokenizeResponse(str(tokenizer.decode(check_ids(tokenizer, body.tokens))))


# ---- prompts


def encode_prompts(
    tokenizer: "PreTrainedTokenizerBase", prompt: object, *, special: bool = True, param: str = "prompt"
) -> list[list[int]]:
    """Return the token ids of each prompt in `prompt`: a text, a list of texts, token ids, or lists of token ids.

    `param` is the field that has them.

    Raises:
        HttpError: 400, a mixture of these, or an unknown token id.
    """
    with invalid_field(param):
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
        400, f"{param} must be a text, a list of texts, token ids, or a list of lists of token ids.", param=param
    )


def encode_text(tokenizer: "PreTrainedTokenizerBase", text: str, *, special: bool = True) -> list[int]:
    """Return the token ids of a plain text; `special` adds what the tokenizer puts around it."""
    return cast("list[int]", tokenizer(text, add_special_tokens=special)["input_ids"])


def encode_messages(
    tokenizer: "PreTrainedTokenizerBase", request: ChatCompletionRequest | TokenizeRequest
) -> list[int]:
    """Return the token ids of a conversation, up to where the answer begins.

    Raises:
        HttpError: 400, there is no chat template, or the template rejects the messages, knows no such role, or
            leaves out tools, their calls or their results.
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
    _check_roles(tokenizer, request.messages or ())
    messages = [_template_message(message) for message in request.messages or ()]
    tools = _tools(request)
    with invalid_field("messages"):
        ids = encode_chat(tokenizer, messages, tools, **settings)
        ignored = ignored_tools(tokenizer, messages, tools, **settings)
    if ignored is not None:
        param = "messages" if ignored != "tools" else "tools" if request.tools else "functions"
        raise HttpError(400, f"The chat template ignores {ignored}.", param=param)
    return ids


def _check_roles(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[ChatMessage]) -> None:
    for index, message in enumerate(messages):
        if message.role not in ROLES and not reads_role(tokenizer, message.role):
            raise HttpError(
                400,
                f"The chat template knows no role {message.role[:64]!r}.",
                param=f"messages[{index}].role",
                hint=f"The roles are {', '.join(ROLES)}.",
            )


def _tools(request: ChatCompletionRequest | TokenizeRequest) -> list[dict[str, Any]] | None:
    """Return the tools that are part of the prompt."""
    if not isinstance(request, ChatCompletionRequest):
        return request.tools or None
    if "none" in (request.tool_choice, request.function_call):
        return None
    functions = [{"type": "function", "function": function} for function in request.functions or ()]
    return [*(request.tools or ()), *functions] or None


def _template_message(message: ChatMessage) -> dict[str, Any]:
    """Return a message as chat templates read it: its content one text, the arguments of its tool calls objects."""
    content = message.content or message.refusal or ""
    calls = [*(message.tool_calls or ())]
    if message.function_call is not None:
        calls.append(ToolCall(message.function_call))
    fields = {
        "role": message.role,
        "content": content if isinstance(content, str) else "\n".join(part.text for part in content),  # as vLLM
        "name": message.name,
        "tool_calls": [_template_call(call) for call in calls] or None,
        "tool_call_id": message.tool_call_id,
        "reasoning_content": message.reasoning_content,
    }
    return {name: value for name, value in fields.items() if value is not None}  # some templates test for a key


def _template_call(call: ToolCall) -> dict[str, Any]:
    arguments = call.function.arguments or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise HttpError(400, f"Invalid JSON in the arguments of a tool call: {error}", param="messages") from error
    function = {"name": call.function.name, "arguments": arguments}
    return {"type": "function", "function": function} | ({"id": call.id} if call.id else {})
