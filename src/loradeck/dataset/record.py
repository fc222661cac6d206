"""One record of a dataset: the forms it can have, and what is wrong with it.

However a file writes it, a record is one of five things: a conversation, a prompt with its completion, a plain text,
token ids, or a preference pair (two answers to one prompt).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, takewhile
from typing import Annotated, Any, NamedTuple, TypeAlias

import msgspec

from loradeck.dataset.message import Json, Message, RawMessage, to_messages, tools
from loradeck.errors import DataError

UNSUPERVISED = -100  # torch.nn.functional.cross_entropy's ignore_index
PAIRS = "preference pairs"
EXPECTED = "messages, prompt and completion, text, alpaca, sharegpt, tokens and labels, or chosen and rejected"


class Span(NamedTuple):
    """A piece of text that is trained on, or context only."""

    text: str
    trained: bool


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages; every assistant message is trained on, except those of weight 0."""

    messages: list[Message]
    tools: list[Json] | None = None
    form: str = field(default="messages", compare=False)

    def spans(self) -> list[Span]:
        """Return the record as text, without a tokenizer."""
        declared = [Span(msgspec.json.encode(self.tools).decode(), trained=False)] if self.tools else []
        return declared + [Span(str(message), message.trained) for message in self.messages]


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt and its completion, which is trained on. With a chat template the prompt is a user message."""

    prompt: str
    completion: str
    form: str = field(default="prompt and completion", compare=False)

    def spans(self) -> list[Span]:
        """Return the record as text, without a tokenizer."""
        return [Span(self.prompt, trained=False), Span(self.completion, trained=True)]


@dataclass(frozen=True, slots=True)
class PlainText:
    """A text without a template; all of it is trained on."""

    text: str
    form: str = field(default="text", compare=False)

    def spans(self) -> list[Span]:
        """Return the record as text, without a tokenizer."""
        return [Span(self.text, trained=True)]


@dataclass(frozen=True, slots=True)
class TokenIds:
    """Token ids. `labels[t]` is `tokens[t]` where it is trained on, UNSUPERVISED elsewhere."""

    tokens: list[int]
    labels: list[int]
    form: str = field(default="tokens", compare=False)

    def spans(self) -> list[Span]:
        """Return the ids as text, separated by spaces."""
        pairs = zip(self.tokens, self.labels, strict=True)
        runs = groupby(pairs, key=lambda pair: pair[1] != UNSUPERVISED)
        return [Span(" ".join(str(token) for token, _ in run), trained) for trained, run in runs]


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """Two records that differ in the answer; the chosen one is preferred."""

    chosen: Conversation | Completion
    rejected: Conversation | Completion
    form: str = field(default=PAIRS, compare=False)

    def spans(self) -> list[Span]:
        """Return the prompt, the chosen answer and the rejected one as text."""
        chosen, rejected = self.chosen.spans(), self.rejected.spans()
        shared = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))))
        return chosen + rejected[shared:]


Record: TypeAlias = Conversation | Completion | PlainText | TokenIds | PreferencePair


class _RawMessages(msgspec.Struct, frozen=True):
    messages: list[RawMessage]
    tools: list[Json] | str | None = None

    def to_record(self) -> Record:
        return _conversation(to_messages(self.messages, "$.messages"), self.tools, "$.messages")


class _RawShareGpt(msgspec.Struct, frozen=True):
    conversations: list[RawMessage]
    system: str | None = None
    tools: list[Json] | str | None = None

    def to_record(self) -> Record:
        system = [Message("system", self.system)] if self.system else []
        messages = to_messages(self.conversations, "$.conversations")
        return replace(_conversation(system + messages, self.tools, "$.conversations"), form="sharegpt")


class _RawAlpaca(msgspec.Struct, frozen=True):
    instruction: str
    output: str
    input: str | None = None
    system: str | None = None
    history: list[tuple[str, str]] | None = None

    def to_record(self) -> Record:
        # As LLaMA-Factory: the input follows the instruction on a new line; answers of the history are trained on too.
        messages = [Message("system", self.system)] if self.system else []
        question = "\n".join(filter(None, [self.instruction, self.input]))
        for user, assistant in [*(self.history or []), (question, self.output)]:
            messages += [Message("user", user), Message("assistant", assistant)]
        _require_text(instruction=question, output=self.output)
        return replace(_conversation(messages, None, "$.history"), form="alpaca")


class _RawCompletion(msgspec.Struct, frozen=True):
    prompt: str | list[RawMessage]
    completion: str | RawMessage | list[RawMessage]
    tools: list[Json] | str | None = None
    label: Any = None
    kto_tag: Any = None

    def to_record(self) -> Record:
        if isinstance(self.label, bool) or self.kto_tag is not None:
            raise DataError("$.label: KTO is not supported: a bad completion would be trained on; keep the good ones")
        if isinstance(self.prompt, str) and isinstance(self.completion, str):
            _require_text(prompt=self.prompt, completion=self.completion)
            return Completion(self.prompt, self.completion)
        prompt = _as_context(_side(self.prompt, "user", "$.prompt"))
        completion = _side(self.completion, "assistant", "$.completion")
        return replace(_conversation(prompt + completion, self.tools, "$.completion"), form="prompt and completion")


class _RawText(msgspec.Struct, frozen=True):
    text: str

    def to_record(self) -> Record:
        _require_text(text=self.text)
        return PlainText(self.text)


class _RawTokens(msgspec.Struct, frozen=True):
    labels: list[int]
    tokens: list[Annotated[int, msgspec.Meta(ge=0)]] | None = None
    input_ids: list[Annotated[int, msgspec.Meta(ge=0)]] | None = None

    def to_record(self) -> Record:
        key, ids = ("tokens", self.tokens) if self.tokens is not None else ("input_ids", self.input_ids or [])
        if len(ids) != len(self.labels):
            raise DataError(f"$.labels: has {len(self.labels)} items, but {key} has {len(ids)}")
        for index, (token, label) in enumerate(zip(ids, self.labels, strict=True)):
            if label not in (token, UNSUPERVISED):
                raise DataError(
                    f"$.labels[{index}]: must be {UNSUPERVISED} or {key}[{index}], which is {token}; not {label}"
                )
        if all(label == UNSUPERVISED for label in self.labels[1:]):
            raise DataError(f"$.labels: nothing to train on; all after the first are {UNSUPERVISED}")
        return TokenIds(ids, self.labels)


class _RawPreference(msgspec.Struct, frozen=True):
    chosen: str | RawMessage | list[RawMessage]
    rejected: str | RawMessage | list[RawMessage]
    prompt: str | list[RawMessage] | None = None
    conversations: list[RawMessage] | None = None
    tools: list[Json] | str | None = None

    def to_record(self) -> Record:
        if isinstance(self.prompt, str) and isinstance(self.chosen, str) and isinstance(self.rejected, str):
            _require_text(prompt=self.prompt, chosen=self.chosen, rejected=self.rejected)
            sides = [Completion(self.prompt, self.chosen), Completion(self.prompt, self.rejected)]
        else:
            key = "prompt" if self.prompt is not None else "conversations"
            prompt = _side(self.prompt if self.prompt is not None else self.conversations or [], "user", f"$.{key}")
            sides = [
                _conversation(messages, self.tools, f"$.{side}")
                for side, messages in zip(("chosen", "rejected"), self._conversations(prompt), strict=True)
            ]
        if sides[0] == sides[1]:
            raise DataError("$.rejected: equals chosen, so neither is preferred")
        return PreferencePair(sides[0], sides[1])

    def _conversations(self, prompt: list[Message]) -> list[list[Message]]:
        """Return both conversations in full; what they share is context only."""
        sides = [_side(self.chosen, "assistant", "$.chosen"), _side(self.rejected, "assistant", "$.rejected")]
        if all(side and side[0].role == "assistant" for side in sides):
            if not prompt:
                raise DataError("$.prompt: is missing, and chosen and rejected are answers only")
            return [_as_context(prompt) + side for side in sides]
        shared = [one for one, other in takewhile(lambda pair: pair[0] == pair[1], zip(*sides, strict=False))]
        if shared == sides[0] == sides[1]:
            return sides  # the caller refuses two equal sides
        if shared[len(shared) - len(prompt) :] != prompt:
            raise DataError("$.prompt: chosen and rejected are whole conversations but do not begin with the prompt")
        for key, side in zip(("chosen", "rejected"), sides, strict=True):
            if len(side) == len(shared) or side[len(shared)].role != "assistant":
                raise DataError(f"$.{key}: must continue with an assistant message where the two begin to differ")
        return [_as_context(shared) + side[len(shared) :] for side in sides]


# A record has the first form whose keys it has: many datasets of a later form also render each record as text.
FORMS: tuple[tuple[Any, set[str]], ...] = (
    (_RawPreference, {"chosen", "rejected"}),
    (_RawTokens, {"tokens", "labels"}),
    (_RawTokens, {"input_ids", "labels"}),
    (_RawMessages, {"messages"}),
    (_RawShareGpt, {"conversations"}),
    (_RawCompletion, {"prompt", "completion"}),
    (_RawAlpaca, {"instruction", "output"}),
    (_RawText, {"text"}),
)


def parse(line: bytes) -> Record:
    """Parse one line of JSON; keys that are null or not part of the form are ignored.

    Raises:
        DataError: the line has none of the forms. The message is `path: what`, as in `$.messages[0].role: …`.
    """
    try:
        text = line.decode("utf-8-sig")  # some editors begin a file with a byte order mark
        fields = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        keys = [key for key, value in fields.items() if bytes(value) != b"null"]
        form = next((form for form, required in FORMS if required <= set(keys)), None)
        if form is None:
            shown = ", ".join(f"{key!r:.24}" for key in keys[:5]) or "none"
            raise DataError(f"$: unknown form; expected {EXPECTED}, but the keys are {shown}")
        record: Record = msgspec.json.decode(text, type=form).to_record()
    except UnicodeDecodeError as error:
        raise DataError(f"byte {error.start} is not UTF-8") from error
    except RecursionError as error:
        raise DataError("is nested too deeply") from error
    except msgspec.DecodeError as error:
        what, _, path = str(error).partition(" - at ")
        raise DataError(f"{path.strip('`') or '$'}: {what}") from error
    return record


def _side(content: str | RawMessage | list[RawMessage], role: str, path: str) -> list[Message]:
    """Return one side of a record (prompt, completion, chosen, rejected) as messages; a string is one of `role`."""
    if isinstance(content, str):
        _require_text(**{path.removeprefix("$."): content})
        return [Message(role, content)]
    return [content.to_message(path)] if isinstance(content, RawMessage) else to_messages(content, path)


def _as_context(messages: Sequence[Message]) -> list[Message]:
    """Return messages of which none is trained on."""
    return [replace(message, weight=0) if message.trained else message for message in messages]


def _conversation(messages: list[Message], declared: list[Json] | str | None, path: str) -> Conversation:
    """Return a conversation of these messages and tools.

    Raises:
        DataError: it begins with an answer, or has nothing to train on.
    """
    if messages and messages[0].role == "assistant":
        raise DataError(f"{path}[0].role: a conversation cannot begin with the assistant")
    if not any(message.trained for message in messages):
        raise DataError(f"{path}: has no assistant message to train on")
    return Conversation(messages, tools(declared))


def _require_text(**texts: str) -> None:
    for key, text in texts.items():
        if not text.strip():
            raise DataError(f"$.{key}: is empty")
