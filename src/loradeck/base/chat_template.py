"""What a chat template has a place for. Many leave tools out without a word, or write any role as its own name."""

import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from loradeck.base.text import TEMPLATE_ROLES, Message, render_chat

PLAIN_ROLES = ("system", "user", "assistant")
CALL, RESULT = "\ue000", "\ue001"  # for private use: they mark the calls and results that a template writes


def reads_role(tokenizer: PreTrainedTokenizerBase, role: str) -> bool:
    """Return whether the chat template is made for a role: for `tool` and the like, it must name it."""
    return role in PLAIN_ROLES or re.search(rf"(['\"]){re.escape(role)}\1", str(tokenizer.chat_template)) is not None


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
    text = render_chat(tokenizer, messages, tools, **variables)
    if tools and text == render_chat(tokenizer, messages, None, **variables):
        return "tools"
    marked = render_chat(tokenizer, [_mark(message) for message in messages], tools, **variables)
    if marked.count(CALL) - text.count(CALL) < calls:
        return "tool calls"
    if marked.count(RESULT) - text.count(RESULT) < results or (results and not reads_role(tokenizer, "tool")):
        return "tool messages"
    return None


def _is_result(message: Message) -> bool:
    return TEMPLATE_ROLES.get(message["role"], message["role"]) == "tool"


def _mark(message: Message) -> dict[str, Any]:
    """Return a message with a mark in the name of each function that it calls, or in a tool's result."""
    calls = [
        {**call, "function": {**call["function"], "name": f"{call['function']['name']}{CALL}"}}
        for call in message.get("tool_calls") or ()
    ]
    content = f"{message['content']}{RESULT}" if _is_result(message) else message["content"]
    return {**message, "content": content} | ({"tool_calls": calls} if calls else {})
