"""One line of a dataset: its three forms, and what is wrong with it. Knows JSON; knows no tokens and no files."""

from typing import TypeAlias

import msgspec

from loradeck.errors import DataError

ROLES = ("system", "user", "assistant")


class Message(msgspec.Struct, frozen=True):
    """One turn of a conversation."""

    role: str
    content: str
    tool_calls: None = None  # named so as to be refused: without them the turn would teach something else


class Conversation(msgspec.Struct, frozen=True):
    """Every assistant turn is learned."""

    messages: list[Message]
    tools: None = None


class Completion(msgspec.Struct, frozen=True):
    """The completion is learned; the prompt is a user's turn where the base has a chat template."""

    prompt: str
    completion: str


class Text(msgspec.Struct, frozen=True):
    """All of it is learned, as plain text."""

    text: str


Record: TypeAlias = Conversation | Completion | Text
FORMS = {Conversation: {"messages"}, Completion: {"prompt", "completion"}, Text: {"text"}}
EXPECTED = "messages, prompt and completion, or text"


def parse(line: bytes) -> Record:
    """Read one line of JSON; keys beyond those of its form are passed over.

    Raises:
        DataError: the line is none of the three forms. The message is `path: what`, as in `$.messages[0].role: is …`.
    """
    try:
        text = line.decode("utf-8-sig")  # some editors begin a file with a byte order mark
        keys = msgspec.json.decode(text, type=dict[str, msgspec.Raw]).keys()
        forms = [form for form, needed in FORMS.items() if needed <= keys]
        if len(forms) != 1:
            shown = ", ".join(f"{key!r:.24}" for key in list(keys)[:5]) or "none"
            raise DataError(f"$: {'more than one' if forms else 'none'} of {EXPECTED}; its keys are {shown}")
        record = msgspec.json.decode(text, type=forms[0])
    except UnicodeDecodeError as error:
        raise DataError(f"byte {error.start} is not UTF-8") from error
    except RecursionError as error:
        raise DataError("is nested too deeply") from error
    except msgspec.DecodeError as error:
        what, _, where = str(error).partition(" - at ")
        raise DataError(f"{where.strip('`') or '$'}: {what}") from error
    if problem := _problem(record):
        raise DataError(problem)
    return record


def _problem(record: Record) -> str | None:
    """Find the first thing wrong with a record of the right form."""
    if not isinstance(record, Conversation):
        return next((f"$.{k}: is empty" for k in record.__struct_fields__ if not getattr(record, k).strip()), None)
    for at, message in enumerate(record.messages):
        if message.role not in ROLES:
            return f"$.messages[{at}].role: is {message.role!r:.24}, not one of {', '.join(ROLES)}"
        if message.role == "assistant" and at == 0:
            return "$.messages[0].role: is assistant, with nothing to answer"
        if message.role == "assistant" and not message.content.strip():
            return f"$.messages[{at}].content: is empty"
    if all(message.role != "assistant" for message in record.messages):
        return "$.messages: has no assistant turn to learn"
    return None
