"""One turn of a conversation: the ways that files write it, and the one way it is kept. Knows JSON; knows no template.

Files write turns as OpenAI does, `role` and `content`, or as ShareGPT does, `from` and `value`.
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
    """One turn, as a chat template takes it."""

    role: str
    content: str
    reasoning: str = ""
    """What was thought before the content."""
    tool_calls: list[Json] = field(default_factory=list)
    """`{"type": "function", "function": {"name": str, "arguments": dict}}`, with an `id` where the file has one."""
    name: str | None = None
    tool_call_id: str | None = None
    weight: int = 1
    """0 for an assistant's turn that is read and not learned."""

    @property
    def learned(self) -> bool:
        """Whether the turn is to be learned: only an assistant's is."""
        return self.role == "assistant" and self.weight == 1

    def for_template(self) -> Json:
        """Return the keys that chat templates know; without the empty ones, for some ask whether a key is there."""
        keys = {
            "reasoning_content": self.reasoning,
            "thinking": self.reasoning,  # what OpenAI's own template calls it
            "tool_calls": self.tool_calls,
            "name": self.name,
            "tool_call_id": self.tool_call_id,
        }
        return {"role": self.role, "content": self.content} | {key: value for key, value in keys.items() if value}

    def __str__(self) -> str:
        """Return the turn as it reads without a template."""
        calls = [msgspec.json.encode(call["function"]).decode() for call in self.tool_calls]
        return f"{self.role}: " + "\n".join(text for text in (self.reasoning, self.content, *calls) if text)


class Part(msgspec.Struct, frozen=True):
    """A piece of a content; only those of type text can be learned here."""

    type: str
    text: str | None = None


class Function(msgspec.Struct, frozen=True):
    """A call of a tool. OpenAI writes the arguments as a string of JSON, which templates would quote once more."""

    name: str
    arguments: Json | str | None = None


class Call(msgspec.Struct, frozen=True):
    """A call as OpenAI writes it, or the bare function."""

    function: Function | None = None
    name: str | None = None
    arguments: Json | str | None = None
    id: str | None = None

    def json(self, path: str) -> Json:
        """Return the call as templates take it."""
        function = self.function or Function(self.name or "", self.arguments)
        if not function.name:
            raise DataError(f"{path}: names no function")
        arguments = function.arguments or {}
        if isinstance(arguments, str):
            arguments = embedded(arguments, Json, f"{path}.arguments")
        call: Json = {"type": "function", "function": {"name": function.name, "arguments": arguments}}
        return call | ({"id": self.id} if self.id else {})


class Turn(msgspec.Struct, frozen=True, rename={"from_": "from"}):
    """One turn as it is in a file."""

    role: str | None = None
    content: str | list[Part] | None = None
    from_: str | None = None
    value: str | None = None
    reasoning_content: str | None = None
    thinking: str | None = None
    tool_calls: list[Call] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    weight: float | None = None
    train: bool | None = None  # named so as to be refused: passed over, it would be learned all the same

    def message(self, path: str) -> Message:
        """Return the turn as it is kept.

        Raises:
            DataError: an unknown role, a content that is no text, or an assistant's turn with nothing in it.
        """
        if self.role is not None and self.from_ is not None:
            raise DataError(f"{path}: has both role and from; keep one")
        key, known = ("from", SHAREGPT) if self.from_ is not None else ("role", dict.fromkeys(ROLES))
        name = self.from_ if self.from_ is not None else self.role
        if name is None:
            raise DataError(f"{path}.role: is missing; it is one of {', '.join(ROLES)}")
        if name not in known:
            raise DataError(f"{path}.{key}: is {name!r:.24}, not one of {', '.join(known)}")
        role = known[name] or name
        calls, content = self.tool_calls or [], self._content(path)
        if name == "function_call":
            calls, content = embedded_list(content, Call, f"{path}.value"), ""
        if role == "assistant" and not content.strip() and not calls:
            raise DataError(f"{path}.{'content' if key == 'role' else 'value'}: is empty")
        if role != "assistant" and calls:
            raise DataError(f"{path}.tool_calls: only the assistant calls tools")
        return Message(
            role,
            content,
            self.reasoning_content or self.thinking or "",
            [call.json(f"{path}.tool_calls[{at}]") for at, call in enumerate(calls)],
            self.name,
            self.tool_call_id,
            self._weight(path, role),
        )

    def _content(self, path: str) -> str:
        if self.from_ is not None:
            return self.value or ""
        if not isinstance(self.content, list):
            return self.content or ""
        for at, part in enumerate(self.content):
            if part.type != "text" or part.text is None:
                raise DataError(f"{path}.content[{at}].type: is {part.type!r:.24}; only text can be learned here")
        return "".join(part.text or "" for part in self.content)

    def _weight(self, path: str, role: str) -> int:
        if self.train is not None:
            raise DataError(f'{path}.train: is not read; write "weight": 0 for a turn that is not to be learned')
        if self.weight not in (None, 0, 1):
            raise DataError(f"{path}.weight: is {self.weight:g}, neither 0 nor 1")
        if self.weight == 1 and role != "assistant":
            raise DataError(f"{path}.weight: is 1, but only an assistant's turn is learned")
        return int(role != "assistant" or self.weight != 0)


def messages(turns: Sequence[Turn], path: str) -> list[Message]:
    """Return turns as they are kept."""
    return [turn.message(f"{path}[{at}]") for at, turn in enumerate(turns)]


def tools(declared: list[Json] | str | None) -> list[Json] | None:
    """Return a conversation's tools in OpenAI's shape; files also write them bare, or all of them as one string.

    Raises:
        DataError: they are no JSON.
    """
    if isinstance(declared, str):
        declared = embedded_list(declared, Json, "$.tools") if declared.strip() else None
    if not declared:
        return None
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in declared]


def embedded(text: str, kind: Any, path: str) -> Any:
    """Read JSON that a file holds as a string.

    Raises:
        DataError: it is no JSON of this kind.
    """
    try:
        return msgspec.json.decode(text, type=kind)
    except (msgspec.DecodeError, RecursionError) as error:
        raise DataError(f"{path}: is not the JSON it should be: {error}") from error


def embedded_list(text: str, kind: Any, path: str) -> list[Any]:
    """Read a list, or the one thing that would be in it."""
    found = embedded(text, kind | list[kind], path)
    return found if isinstance(found, list) else [found]
