"""A chat message: the ways that files write it, and the one form used here.

Files write messages as OpenAI does (`role` and `content`) or as ShareGPT does (`from` and `value`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import msgspec

from loradeck.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
# The names in ShareGPT's files, as LLaMA-Factory reads them.
SHAREGPT = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
Json: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation, as a chat template takes it."""

    role: str
    content: str
    reasoning: str = ""
    """The assistant's thinking before the content."""
    tool_calls: list[Json] = field(default_factory=list)
    """`{"type": "function", "function": {"name": str, "arguments": dict}}`, and an `id` if the file gives one."""
    name: str | None = None
    tool_call_id: str | None = None
    weight: int = 1
    """0 for an assistant message that is context only."""

    @property
    def trained(self) -> bool:
        """Whether the message is trained on: only assistant messages are."""
        return self.role == "assistant" and self.weight == 1

    def for_template(self) -> Json:
        """Return the keys that chat templates read, without empty ones: some templates test whether a key exists."""
        keys = {
            "reasoning_content": self.reasoning,
            "thinking": self.reasoning,  # the key in OpenAI's own template
            "tool_calls": self.tool_calls,
            "name": self.name,
            "tool_call_id": self.tool_call_id,
        }
        return {"role": self.role, "content": self.content} | {key: value for key, value in keys.items() if value}

    def __str__(self) -> str:
        """Return the message as text, without a template."""
        calls = [msgspec.json.encode(call["function"]).decode() for call in self.tool_calls]
        return f"{self.role}: " + "\n".join(text for text in (self.reasoning, self.content, *calls) if text)


class ContentPart(msgspec.Struct, frozen=True):
    """A part of a message's content; only type text is supported."""

    type: str
    text: str | None = None


class FunctionCall(msgspec.Struct, frozen=True):
    """A function's name and arguments. OpenAI writes the arguments as a JSON string; templates would quote it again."""

    name: str
    arguments: Json | str | None = None


class ToolCall(msgspec.Struct, frozen=True):
    """A tool call as OpenAI writes it, or the bare function."""

    function: FunctionCall | None = None
    name: str | None = None
    arguments: Json | str | None = None
    id: str | None = None

    def for_template(self, path: str) -> Json:
        """Return the call as chat templates take it."""
        function = self.function or FunctionCall(self.name or "", self.arguments)
        if not function.name:
            raise DataError(f"{path}: names no function")
        arguments = function.arguments or {}
        if isinstance(arguments, str):
            arguments = decode(arguments, Json, f"{path}.arguments")
        call: Json = {"type": "function", "function": {"name": function.name, "arguments": arguments}}
        return call | ({"id": self.id} if self.id else {})


class RawMessage(msgspec.Struct, frozen=True, rename={"from_": "from"}):
    """A message as a file writes it."""

    role: str | None = None
    content: str | list[ContentPart] | None = None
    from_: str | None = None
    value: str | None = None
    reasoning_content: str | None = None
    thinking: str | None = None
    tool_calls: list[ToolCall] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    weight: float | None = None
    train: bool | None = None  # declared in order to refuse it: ignored, the message would be trained on all the same

    def to_message(self, path: str) -> Message:
        """Return the message in the form used here; `path` is its JSON path, for errors.

        Raises:
            DataError: an unknown role, a content that is not text, or an empty assistant message.
        """
        if self.role is not None and self.from_ is not None:
            raise DataError(f"{path}: has both role and from; keep one")
        key, roles = ("from", SHAREGPT) if self.from_ is not None else ("role", dict.fromkeys(ROLES))
        name = self.from_ if self.from_ is not None else self.role
        if name is None:
            raise DataError(f"{path}.role: is missing; expected one of {', '.join(ROLES)}")
        if name not in roles:
            raise DataError(f"{path}.{key}: unknown role {name!r:.24}; expected one of {', '.join(roles)}")
        role = roles[name] or name
        calls, content = self.tool_calls or [], self._content(path)
        if name == "function_call":
            calls, content = decode_list(content, ToolCall, f"{path}.value"), ""
        if role == "assistant" and not content.strip() and not calls:
            raise DataError(f"{path}.{'content' if key == 'role' else 'value'}: is empty")
        if role != "assistant" and calls:
            raise DataError(f"{path}.tool_calls: only the assistant calls tools")
        return Message(
            role,
            content,
            self.reasoning_content or self.thinking or "",
            [call.for_template(f"{path}.tool_calls[{index}]") for index, call in enumerate(calls)],
            self.name,
            self.tool_call_id,
            self._weight(path, role),
        )

    def _content(self, path: str) -> str:
        if self.from_ is not None:
            return self.value or ""
        if not isinstance(self.content, list):
            return self.content or ""
        for index, part in enumerate(self.content):
            if part.type != "text" or part.text is None:
                raise DataError(f"{path}.content[{index}].type: unsupported type {part.type!r:.24}; only text is")
        return "".join(part.text or "" for part in self.content)

    def _weight(self, path: str, role: str) -> int:
        if self.train is not None:
            raise DataError(f'{path}.train: is not supported; write "weight": 0 for a message not to train on')
        if self.weight not in (None, 0, 1):
            raise DataError(f"{path}.weight: must be 0 or 1, not {self.weight:g}")
        if self.weight == 1 and role != "assistant":
            raise DataError(f"{path}.weight: is 1, but only assistant messages are trained on")
        return int(role != "assistant" or self.weight != 0)


def to_messages(raw: Sequence[RawMessage], path: str) -> list[Message]:
    """Return a file's messages in the form used here; `path` is the list's JSON path, for errors."""
    return [message.to_message(f"{path}[{index}]") for index, message in enumerate(raw)]


def tools(declared: list[Json] | str | None) -> list[Json] | None:
    """Return a conversation's tools in OpenAI's shape; files also write bare functions, or one JSON string.

    Raises:
        DataError: invalid JSON.
    """
    if isinstance(declared, str):
        declared = decode_list(declared, Json, "$.tools") if declared.strip() else None
    if not declared:
        return None
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in declared]


def decode(text: str, type_: Any, path: str) -> Any:
    """Decode JSON that a file holds as a string.

    Raises:
        DataError: invalid JSON, or not of this type.
    """
    try:
        return msgspec.json.decode(text, type=type_)
    except (msgspec.DecodeError, RecursionError) as error:
        raise DataError(f"{path}: invalid JSON: {error}") from error


def decode_list(text: str, type_: Any, path: str) -> list[Any]:
    """Decode a list, or a single item as a list of one."""
    value = decode(text, type_ | list[type_], path)
    return value if isinstance(value, list) else [value]
