"""Token ids of what a request gives: texts, token ids, a conversation through the base's template. Knows no model."""

import inspect
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import msgspec

from loradeck.api.errors import HttpError
from loradeck.api.requests import ChatRequest, Message, TokenizeRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def texts(tokenizer: "PreTrainedTokenizerBase", prompt: object, *, special: bool = True) -> list[list[int]]:
    """Return the token ids of `prompt`: a text, texts, token ids, or lists of token ids.

    Raises:
        HttpError: 400, it is a mixture, or an id is no token of the base.
    """
    match prompt:
        case str():
            return [encode(tokenizer, prompt, special=special)]
        case [*parts] if all(isinstance(part, str) for part in parts):
            return [encode(tokenizer, str(part), special=special) for part in parts]
        case [*parts] if all(isinstance(part, int) for part in parts):
            return [known(tokenizer, cast("list[int]", parts), "prompt")]
        case [*parts] if all(isinstance(part, list) for part in parts):
            return [known(tokenizer, part, "prompt") for part in parts]
    raise HttpError(400, "prompt is a text, a list of texts, token ids, or a list of those.", param="prompt")


def encode(tokenizer: "PreTrainedTokenizerBase", text: str, *, special: bool = True) -> list[int]:
    """Return the token ids of a plain text, with what the tokenizer puts before it unless `special` is false."""
    return cast("list[int]", tokenizer(text, add_special_tokens=special)["input_ids"])


def known(tokenizer: "PreTrainedTokenizerBase", ids: list[int], param: str) -> list[int]:
    """Return the ids if all are the base's.

    Raises:
        HttpError: 400.
    """
    if max(ids, default=0) >= len(tokenizer):
        raise HttpError(400, f"{max(ids)} is no token of the base, which has {len(tokenizer)}.", param=param)
    return ids


def chat(tokenizer: "PreTrainedTokenizerBase", request: ChatRequest | TokenizeRequest) -> list[int]:
    """Return the token ids of a conversation, up to where the answer begins.

    Raises:
        HttpError: 400, the base has no chat template, or it refuses the messages, or ignores the tools.
    """
    if tokenizer.chat_template is None:
        hint = "Use /v1/completions, or a base tuned for chat."
        raise HttpError(400, "The base's tokenizer has no chat template.", param="messages", hint=hint)
    given = request.chat_template_kwargs or {}
    taken = given.keys() & inspect.signature(tokenizer.apply_chat_template).parameters
    if taken:  # a template of the client's own, say
        raise HttpError(400, f"{sorted(taken)[0]} is not the template's.", param="chat_template_kwargs")
    extend = bool(request.continue_final_message)
    begin = not extend if request.add_generation_prompt is None else request.add_generation_prompt
    if extend and begin:
        hint = "Set one of them to false."
        param = "continue_final_message"
        raise HttpError(
            400, "continue_final_message and add_generation_prompt contradict each other.", param=param, hint=hint
        )
    settings = {**given, "add_generation_prompt": begin, "continue_final_message": extend}
    messages = [_plain(message) for message in request.messages or ()]
    tools = request.tools if getattr(request, "tool_choice", None) != "none" else None
    ids = _render(tokenizer, messages, tools or None, settings)
    if tools and ids == _render(tokenizer, messages, None, settings):
        raise HttpError(400, "The base's chat template has no place for tools.", param="tools")
    return ids


def _render(
    tokenizer: "PreTrainedTokenizerBase",
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    settings: Mapping[str, Any],
) -> list[int]:
    try:
        ids = tokenizer.apply_chat_template(messages, tools, return_dict=False, **settings)  # type: ignore[arg-type]
    except Exception as error:  # a template is a stranger's program and can fail in any way
        message = f"The base's chat template refuses the messages: {error}"
        raise HttpError(400, message, param="messages") from error
    return cast("list[int]", ids)


def _plain(message: Message) -> dict[str, Any]:
    """Return a message as chat templates expect it: one text, and the arguments of calls as objects."""
    plain = {name: value for name, value in msgspec.structs.asdict(message).items() if value is not None}
    content = message.content or ""
    plain["content"] = content if isinstance(content, str) else "\n".join(part.text for part in content)  # as vLLM
    if message.tool_calls is not None:
        plain["tool_calls"] = [_call(call) for call in message.tool_calls]
    return plain


def _call(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        return {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}
    except (ValueError, RecursionError) as error:
        raise HttpError(400, f"The arguments of a call are no JSON: {error}", param="messages") from error
