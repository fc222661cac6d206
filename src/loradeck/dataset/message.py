"""A chat message: the ways that files write it, and the one form used here.

Files write messages as OpenAI does (`role` and `content`) or as ShareGPT does (`from` and `value`).
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias, TypeVar

import msgspec

from loradeck.dataset.marker import WEIGHTS, is_empty, is_known, read_weight
from loradeck.errors import DataError

T = TypeVar("T")

ROLES = ("system", "user", "assistant", "tool")
OPENAI = {role: role for role in ROLES} | {"developer": "system", "function": "tool"}
# The names in ShareGPT's files, as LLaMA-Factory, Axolotl and FastChat read them.
SHAREGPT = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "tool_call": "assistant",
    "function_response": "tool",
    "tool_response": "tool",
}
SHOWN = 20  # characters of invalid JSON
HALF_PAIR = re.compile(
    r"\\u[dD][89abAB][\da-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB]..)\\u[dD][c-fC-F][\da-fA-F]{2}"
)
CALLS = ("function_call", "tool_call")  # in ShareGPT's files, messages whose value is calls as JSON
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
    unused: tuple[str, ...] = field(default=(), compare=False)
    """Keys of the file that are passed over, as `messages[].key`."""

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

    type: str = "text"
    text: str | None = None


Content: TypeAlias = str | list[ContentPart] | None


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
    content: Content = None
    from_: str | None = None
    value: Content = None
    reasoning_content: str | None = None
    thinking: str | None = None
    tool_calls: list[ToolCall] | None = None
    function_call: FunctionCall | None = None
    name: str | None = None
    tool_call_id: str | None = None

    def to_message(self, path: str) -> Message:
        """Return the message in the form used here; `path` is its JSON path, for errors.

        Raises:
            DataError: an unknown role, a content that is not text, or an empty message.
        """
        if self.role is not None and self.from_ is not None:
            raise DataError(f"{path}: has both role and from; keep one")
        key, roles = ("from", SHAREGPT) if self.from_ is not None else ("role", OPENAI)
        name = self.from_ if self.from_ is not None else self.role
        if name is None:
            raise DataError(f"{path}.role: is missing; expected one of {', '.join(ROLES)}")
        if roles is SHAREGPT:
            name = name.lower()  # some write Human and GPT
        if name not in roles:
            shown = ", ".join(ROLES if roles is OPENAI else SHAREGPT)
            raise DataError(f"{path}.{key}: unknown role {name!r:.24}; expected one of {shown}")
        role = roles[name]
        calls = self._calls(path)
        at = "content" if self.value is None and (self.from_ is None or self.content is not None) else "value"
        content = text_of(self.content if at == "content" else self.value, f"{path}.{at}")
        if self.from_ in CALLS:
            calls, content = decode_list(content, ToolCall, f"{path}.{at}"), ""
        if role in ("user", "assistant") and not content.strip() and not calls:
            raise DataError(f"{path}.{at}: is empty")
        if role != "assistant" and calls:
            raise DataError(f"{path}.tool_calls: only the assistant calls tools")
        return Message(
            role,
            content,
            self.reasoning_content or self.thinking or "",
            [call.for_template(f"{path}.tool_calls[{index}]") for index, call in enumerate(calls)],
            self.name,
            self.tool_call_id,
        )

    def _calls(self, path: str) -> list[ToolCall]:
        if self.function_call is None:
            return self.tool_calls or []
        if self.tool_calls:
            raise DataError(f"{path}: has both tool_calls and function_call; keep one")
        return [ToolCall(self.function_call)]


KNOWN = set(RawMessage.__struct_encode_fields__)


def to_message(raw: Json, path: str, name: str) -> Message:
    """Return a file's message in the form used here.

    `path` is its JSON path, for errors; `name` that of any like it, for its keys that are passed over.

    Raises:
        DataError: as RawMessage.to_message; or it is marked in a way that is not supported.
    """
    message = convert(raw, RawMessage, path).to_message(path)
    weight = read_weight(raw, path)
    if weight == 1 and message.role != "assistant":
        key = next(key for key in raw if key in WEIGHTS and not is_empty(raw[key]))
        raise DataError(f"{path}.{key}: is 1, but only assistant messages are trained on")
    context = message.role == "assistant" and weight == 0
    unused = unused_keys(raw, KNOWN)
    return replace(message, weight=0 if context else 1, unused=tuple(f"{name}.{key}" for key in unused))


def to_messages(raw: Sequence[Json], path: str) -> list[Message]:
    """Return a file's messages in the form used here; `path` is the list's JSON path, for errors."""
    name = path.removeprefix("$.")
    return [to_message(message, f"{path}[{index}]", f"{name}[]") for index, message in enumerate(raw)]


def unused_keys(raw: Json, known: Collection[str]) -> list[str]:
    """Return the keys that are passed over though they hold something."""
    return [key for key, value in raw.items() if key not in known and not is_known(key, value) and not is_empty(value)]


def text_of(content: Content, path: str) -> str:
    """Return the text of a content, which files also write as a list of parts.

    Raises:
        DataError: a part is not text.
    """
    if not isinstance(content, list):
        return content or ""
    for index, part in enumerate(content):
        if part.type != "text" or part.text is None:
            raise DataError(f"{path}[{index}].type: unsupported type {part.type!r:.24}; only text is")
    return "".join(part.text or "" for part in content)


def tools(declared: list[Json] | str | None, key: str) -> list[Json] | None:
    """Return a conversation's tools in OpenAI's shape; files also write bare functions, or one JSON string.

    Raises:
        DataError: invalid JSON; the error names `key`.
    """
    if isinstance(declared, str):
        declared = decode_list(declared, Json, f"$.{key}") if declared.strip() else None
    if not declared:
        return None
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in declared]


def convert(raw: object, type_: type[T], path: str) -> T:
    """Convert decoded JSON to a type.

    Raises:
        DataError: it is not of this type.
    """
    try:
        return msgspec.convert(raw, type_)
    except msgspec.ValidationError as error:
        what, _, at = str(error).partition(" - at ")
        raise DataError(f"{path}{at.strip('`').removeprefix('$')}: {what}") from error


def decode(text: str, type_: Any, path: str, *, hint: str = "") -> Any:
    """Decode JSON that a file holds as a string.

    Raises:
        DataError: invalid JSON, or not of this type.
    """
    try:
        return msgspec.json.decode(text, type=type_)
    except RecursionError as error:
        raise DataError(f"{path}: is nested too deeply", hint=hint) from error
    except msgspec.DecodeError as error:
        raise DataError(f"{path}: invalid JSON: {explain(error, text)}", hint=hint) from error


def explain(error: msgspec.DecodeError, text: str) -> str:
    """Return what is wrong with JSON, with the text at the place."""
    what = str(error)
    if (half := HALF_PAIR.search(text)) and ("surrogate" in what or "truncated" in what):
        return f"{half[0]} is half of a surrogate pair, and no character"
    if place := re.search(r"\(byte (\d+)\)", what):
        rest = text.encode()[int(place[1]) :].decode(errors="replace").strip()
        return f"{what}, at {rest[:SHOWN]!r}" if rest else what
    return what


def decode_list(text: str, type_: Any, path: str) -> list[Any]:
    """Decode a list, or a single item as a list of one."""
    value = decode(text, type_ | list[type_], path)
    return value if isinstance(value, list) else [value]
