"""Conversations as a chat template writes them.

Many templates leave tools out without a word, or write any role as its own name: hence `ignored_tools`, `reads_role`.
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias, cast

from transformers import PreTrainedTokenizerBase

from loradeck.errors import ConfigError

Message: TypeAlias = Mapping[str, Any]  # {"role": "user", "content": "..."}
PLAIN_ROLES = ("system", "user", "assistant")
TEMPLATE_ROLES = {"developer": "system", "function": "tool"}  # OpenAI's names for the roles of chat templates
SYSTEM_ROLES = ("system", "developer")
CALL, RESULT = "\ue000", "\ue001"  # for private use: they mark the calls and results that a template writes


def encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: list[dict[str, Any]] | None = None,
    /,
    *,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> list[int]:
    """Return the token ids of a conversation as the chat template renders it; `variables` are the template's.

    Raises:
        ConfigError: there is no chat template, or the template rejects the messages.
    """
    ids = _apply(tokenizer, messages, tools, tokenize=True, add_generation_prompt=add_generation_prompt, **variables)
    return cast("list[int]", ids)


def reads_role(tokenizer: PreTrainedTokenizerBase, role: str) -> bool:
    """Return whether the chat template is made for a role: for `tool` and the like, it must name it."""
    template = tokenizer.chat_template
    sources = template.values() if isinstance(template, dict) else [str(template)]  # some have several
    name = re.compile(rf"(['\"]){re.escape(role)}\1")
    return role in PLAIN_ROLES or any(name.search(source) for source in sources)


def ignored_tools(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: list[dict[str, Any]] | None,
    /,
    **variables: Any,
) -> str | None:
    """Return which of a conversation's tools the chat template leaves out: `tools`, `tool calls` or `tool messages`.

    None if it leaves out nothing. `variables` as in `encode_chat`.

    Raises:
        ConfigError: the template rejects the messages.
    """
    calls = sum(len(message.get("tool_calls") or ()) for message in messages)
    results = sum(map(_is_result, messages))
    if not (tools or calls or results):
        return None
    render = partial(_apply, tokenizer, tokenize=False, **variables)
    text = render(messages, tools)
    if tools and text == render(messages, None):
        return "tools"
    marked = render([_mark(message) for message in messages], tools)
    if marked.count(CALL) - text.count(CALL) < calls:
        return "tool calls"
    if marked.count(RESULT) - text.count(RESULT) < results or (results and not reads_role(tokenizer, "tool")):
        return "tool messages"
    return None


def _is_result(message: Message) -> bool:
    return TEMPLATE_ROLES.get(message["role"], message["role"]) == "tool"


def _mark(message: Message) -> dict[str, Any]:
    """Return a message with a mark in the name of each function that it calls, or in a tool's result."""
    content = f"{message['content']}{RESULT}" if _is_result(message) else message["content"]
    calls = [_mark_call(call) for call in message.get("tool_calls") or ()]
    return {**message, "content": content} | ({"tool_calls": calls} if calls else {})


def _mark_call(call: Mapping[str, Any]) -> dict[str, Any]:
    if "function" in call:
        return {**call, "function": _mark_call(call["function"])}
    return {**call, "name": f"{call.get('name', '')}{CALL}"}


def _apply(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: list[dict[str, Any]] | None,
    /,
    **variables: Any,
) -> Any:
    if tokenizer.chat_template is None:
        raise ConfigError(
            "there is no chat template for messages",
            hint="Give the prompt as one text, without roles or a system prompt, or use a base tuned for chat.",
        )
    settings: dict[str, Any] = {**variables, "tools": tools}
    try:
        return tokenizer.apply_chat_template(_turns(messages), return_dict=False, **settings)
    except Exception as error:  # a template is an untrusted program and can fail in any way
        raise ConfigError(
            f"the chat template rejects the messages: {error}",
            hint="Use the roles, and their order, that the base or the adapter was trained with.",
        ) from error


def _turns(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return messages in the roles of chat templates: a developer's are the system's, a function's those of a tool.

    A developer's message beside one of the system's becomes part of it: templates expect one.
    """
    turns: list[dict[str, Any]] = []
    previous = ""
    for message in messages:
        role = message.get("role")
        if role in SYSTEM_ROLES and previous in SYSTEM_ROLES and "developer" in (role, previous):
            turns[-1]["content"] += f"\n\n{message['content']}"
        else:
            turns.append({**message, "role": TEMPLATE_ROLES.get(str(role), role)})
        previous = str(role)
    return turns
