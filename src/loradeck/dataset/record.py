"""One record of a dataset: the forms it can have, and what is wrong with it.

However a file writes it, a record is one of seven things: a conversation, a prompt with its completion, a plain text,
token ids, a preference pair (two answers to one prompt), a text with its label, or words with their tags.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, takewhile
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple, TypeAlias

import msgspec

from loradeck.dataset.columns import in_source_names, rename, replaced_keys, unknown_form, with_suggestion
from loradeck.dataset.marker import check_record
from loradeck.dataset.message import (
    Content,
    Json,
    Message,
    convert,
    decode,
    explain,
    text_of,
    to_message,
    to_messages,
    tools,
    unused_keys,
)
from loradeck.errors import DataError

UNSUPERVISED = -100  # torch.nn.functional.cross_entropy's ignore_index
PAIRS = "preference pairs"
LISTS = ("messages", "conversations", "history", "tokens", "input_ids", "labels", "attention_mask", "tags")
CELL = "A list in a cell must be JSON; save the dataset as JSON lines."
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
    unused: tuple[str, ...] = field(default=(), compare=False)

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
    unused: tuple[str, ...] = field(default=(), compare=False)

    def spans(self) -> list[Span]:
        """Return the record as text, without a tokenizer."""
        return [Span(self.prompt, trained=False), Span(self.completion, trained=True)]


@dataclass(frozen=True, slots=True)
class PlainText:
    """A text without a template; all of it is trained on."""

    text: str
    form: str = field(default="text", compare=False)
    unused: tuple[str, ...] = field(default=(), compare=False)

    def spans(self) -> list[Span]:
        """Return the record as text, without a tokenizer."""
        return [Span(self.text, trained=True)]


@dataclass(frozen=True, slots=True)
class TokenIds:
    """Token ids. `labels[t]` is `tokens[t]` where it is trained on, UNSUPERVISED elsewhere."""

    tokens: list[int]
    labels: list[int]
    form: str = field(default="tokens", compare=False)
    unused: tuple[str, ...] = field(default=(), compare=False)

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
    unused: tuple[str, ...] = field(default=(), compare=False)

    def spans(self) -> list[Span]:
        """Return the prompt, the chosen answer and the rejected one as text."""
        chosen, rejected = self.chosen.spans(), self.rejected.spans()
        shared = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))))
        return chosen + rejected[shared:]


@dataclass(frozen=True, slots=True)
class LabelledText:
    """A text, or a pair of texts, and its label."""

    texts: tuple[str, ...]
    label: str
    form: str = field(default="text and label", compare=False)
    unused: tuple[str, ...] = field(default=(), compare=False)

    def spans(self) -> list[Span]:
        """Return the texts, and the label, which is learned."""
        return [*(Span(text, trained=False) for text in self.texts), Span(self.label, trained=True)]


@dataclass(frozen=True, slots=True)
class TaggedWords:
    """Words, each with its tag, or None where there is nothing to learn."""

    words: list[str]
    tags: list[str | None]
    form: str = field(default="tokens and tags", compare=False)
    unused: tuple[str, ...] = field(default=(), compare=False)

    def spans(self) -> list[Span]:
        """Return the words, and their tags, which are learned."""
        tags = " ".join("-" if tag is None else tag for tag in self.tags)
        return [Span(" ".join(self.words), trained=False), Span(tags, trained=True)]


Record: TypeAlias = Conversation | Completion | PlainText | TokenIds | PreferencePair | LabelledText | TaggedWords


class _RawTurns(msgspec.Struct, frozen=True, kw_only=True):
    """What can stand beside the turns of a record, in every form that has turns."""

    system: Content = None
    tools: list[Json] | str | None = None
    functions: list[Json] | str | None = None  # OpenAI's older name

    @property
    def has_context(self) -> bool:
        """Whether there is something that only a chat template can place."""
        return bool(self._system() or self._tools())

    def conversation(self, messages: list[Message], path: str) -> Conversation:
        """Return a conversation of these messages, with the system message and the tools.

        Raises:
            DataError: it begins with an answer, has nothing to train on, or has two system messages.
        """
        if messages and messages[0].role == "assistant":
            raise DataError(f"{path}[0].role: a conversation cannot begin with the assistant")
        if not any(message.trained for message in messages):
            raise DataError(f"{path}: has no assistant message to train on")
        system = self._system()
        if system and messages[0].role != "system":
            messages = [Message("system", system), *messages]
        elif system and messages[0].content != system:
            raise DataError("$.system: differs from the system message; keep one")
        return Conversation(messages, self._tools())

    def _system(self) -> str:
        system = text_of(self.system, "$.system")
        return system if system.strip() else ""

    def _tools(self) -> list[Json] | None:
        declared, functions = tools(self.tools, "tools"), tools(self.functions, "functions")
        if declared and functions:
            raise DataError("$.functions: stands beside tools; keep one")
        return declared or functions


class _RawMessages(_RawTurns, frozen=True, kw_only=True):
    messages: list[Json]

    def to_record(self) -> Record:
        return self.conversation(to_messages(self.messages, "$.messages"), "$.messages")


class _RawShareGpt(_RawTurns, frozen=True, kw_only=True):
    conversations: list[Json]

    def to_record(self) -> Record:
        messages = to_messages(self.conversations, "$.conversations")
        return replace(self.conversation(messages, "$.conversations"), form="sharegpt")


class _RawAlpaca(_RawTurns, frozen=True, kw_only=True):
    instruction: str
    output: str
    input: str | None = None
    history: list[tuple[str, str]] | None = None

    def to_record(self) -> Record:
        # As LLaMA-Factory: the input follows the instruction on a new line; answers of the history are trained on too.
        question = "\n".join(filter(None, [self.instruction, self.input]))
        require_text(instruction=question, output=self.output)
        messages: list[Message] = []
        for index, (user, assistant) in enumerate(self.history or []):
            require_text(**{f"history[{index}][0]": user, f"history[{index}][1]": assistant})
            messages += [Message("user", user), Message("assistant", assistant)]
        messages += [Message("user", question), Message("assistant", self.output)]
        return replace(self.conversation(messages, "$.history"), form="alpaca")


class _RawCompletion(_RawTurns, frozen=True, kw_only=True):
    prompt: str | list[Json]
    completion: str | Json | list[Json]

    def to_record(self) -> Record:
        if isinstance(self.prompt, str) and isinstance(self.completion, str) and not self.has_context:
            require_text(prompt=self.prompt, completion=self.completion)
            return Completion(self.prompt, self.completion)
        prompt = _as_context(_side(self.prompt, "user", "$.prompt"))
        completion = _side(self.completion, "assistant", "$.completion")
        return replace(self.conversation(prompt + completion, "$.completion"), form="prompt and completion")


class _RawText(msgspec.Struct, frozen=True):
    text: str

    def to_record(self) -> Record:
        require_text(text=self.text)
        return PlainText(self.text)


class _RawTokens(msgspec.Struct, frozen=True):
    labels: list[int]
    tokens: list[Annotated[int, msgspec.Meta(ge=0)]] | None = None
    input_ids: list[Annotated[int, msgspec.Meta(ge=0)]] | None = None
    attention_mask: list[int] | None = None

    def to_record(self) -> Record:
        key, ids = ("tokens", self.tokens) if self.tokens is not None else ("input_ids", self.input_ids or [])
        if len(ids) != len(self.labels):
            raise DataError(f"$.labels: has {len(self.labels)} items, but {key} has {len(ids)}")
        if 0 in (self.attention_mask or ()):
            raise DataError("$.attention_mask: has zeros; remove the padding")
        for index, (token, label) in enumerate(zip(ids, self.labels, strict=True)):
            if label not in (token, UNSUPERVISED):
                raise DataError(
                    f"$.labels[{index}]: must be {UNSUPERVISED} or {key}[{index}], which is {token}; not {label}"
                )
        if all(label == UNSUPERVISED for label in self.labels[1:]):
            raise DataError(f"$.labels: nothing to train on; all after the first are {UNSUPERVISED}")
        return TokenIds(ids, self.labels)


class _RawPreference(_RawTurns, frozen=True, kw_only=True):
    chosen: str | Json | list[Json]
    rejected: str | Json | list[Json]
    prompt: str | list[Json] | None = None
    conversations: list[Json] | None = None

    def to_record(self) -> Record:
        prompt, chosen, rejected = self.prompt, self.chosen, self.rejected
        texts = isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str)
        if texts and not self.has_context:
            require_text(prompt=prompt, chosen=chosen, rejected=rejected)
            sides = [Completion(prompt, chosen), Completion(prompt, rejected)]
        else:
            key = "prompt" if prompt is not None else "conversations"
            context = _side(prompt if prompt is not None else self.conversations or [], "user", f"$.{key}")
            sides = [
                self.conversation(messages, f"$.{side}")
                for side, messages in zip(("chosen", "rejected"), self._conversations(context), strict=True)
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


class _OpenAiInput(msgspec.Struct, frozen=True, kw_only=True):
    messages: list[Json]
    tools: list[Json] | None = None


class _RawOpenAiPreference(msgspec.Struct, frozen=True, kw_only=True):
    input: _OpenAiInput
    preferred_output: list[Json]
    non_preferred_output: list[Json]

    def to_record(self) -> Record:
        pair = _RawPreference(
            prompt=self.input.messages,
            tools=self.input.tools,
            chosen=self.preferred_output,
            rejected=self.non_preferred_output,
        )
        try:
            return pair.to_record()
        except DataError as error:
            names = {"prompt": "input.messages", "chosen": "preferred_output", "rejected": "non_preferred_output"}
            raise in_source_names(error, names) from error


@dataclass(frozen=True, slots=True)
class Forms:
    """The forms of a record for one task: it has the first of them whose keys it has."""

    table: tuple[tuple[Any, Collection[str]], ...]
    expected: str
    """What a record of none of them should have."""
    usual: Callable[[Json], Mapping[str, str]] = lambda _: {}
    """Returns the names that a record uses for our keys, where they are other ones and need not be told."""
    needed: tuple[str, ...] = ()
    """The keys that a suggestion of columns names; empty if it is to be guessed."""


# Many datasets of a later form also render each record as text.
FORMS: tuple[tuple[Any, set[str]], ...] = (
    (_RawPreference, {"chosen", "rejected"}),
    (_RawOpenAiPreference, {"preferred_output", "non_preferred_output"}),
    (_RawTokens, {"tokens", "labels"}),
    (_RawTokens, {"input_ids", "labels"}),
    (_RawMessages, {"messages"}),
    (_RawShareGpt, {"conversations"}),
    (_RawCompletion, {"prompt", "completion"}),
    (_RawAlpaca, {"instruction", "output"}),
    (_RawText, {"text"}),
)
GENERATE = Forms(FORMS, EXPECTED)
REWARD = Forms(FORMS[:2], "chosen and rejected, with a prompt", needed=("prompt", "chosen", "rejected"))


def parse(line: bytes, columns: Mapping[str, str] = MappingProxyType({}), forms: Forms = GENERATE) -> Record:
    """Parse one line of JSON; keys that are null, or not part of the form, are passed over.

    `columns` maps our keys to the line's, where they differ.

    Raises:
        DataError: the line has none of the forms. The message is `path: what`, as in `$.messages[0].role: …`.
    """
    try:
        text = line.decode("utf-8-sig")  # some editors begin a file with a byte order mark
    except UnicodeDecodeError as error:
        raise DataError(f"byte {error.start} is not UTF-8") from error
    try:
        return _record(msgspec.json.decode(text, type=Json), columns, forms)
    except RecursionError as error:
        raise DataError("is nested too deeply") from error
    except msgspec.DecodeError as error:
        what, _, path = explain(error, text).partition(" - at ")
        raise DataError(f"{path.strip('`') or '$'}: {what}") from error


def _record(keys: Json, columns: Mapping[str, str], forms: Forms) -> Record:
    columns = {**forms.usual(rename(keys, columns)), **columns}
    renamed = rename(keys, columns)
    present = {key for key, value in renamed.items() if value is not None}
    form = next((form for form, required in forms.table if present.issuperset(required)), None)
    if form is None:
        raise unknown_form(f"$: unknown form; expected {forms.expected}", keys, columns, forms.needed)
    try:
        others = {key: value for key, value in renamed.items() if key not in form.__struct_encode_fields__}
        check_record(others, plain=form in (_RawText, _RawTokens))
        record: Record = convert(_with_lists(renamed, form.__struct_encode_fields__), form, "$").to_record()
    except DataError as error:
        if error.message.startswith("$.prompt: is missing"):
            raise with_suggestion(error, [*keys], ("prompt",)) from error
        raise in_source_names(error, columns) from error
    sides = (record.chosen, record.rejected) if isinstance(record, PreferencePair) else (record,)
    messages = [message for side in sides if isinstance(side, Conversation) for message in side.messages]
    unused = [*unused_keys(renamed, form.__struct_encode_fields__), *replaced_keys(keys, columns)]
    unused += [key for message in messages for key in message.unused]
    return replace(record, unused=tuple(dict.fromkeys(unused)))


def _with_lists(keys: Json, names: Collection[str]) -> Json:
    """Return a record with its lists decoded; a cell of a table holds a list as JSON."""
    return {
        key: decode(value, list[Any], f"$.{key}", hint=CELL)
        if key in LISTS and key in names and isinstance(value, str) and value.lstrip().startswith("[")
        else value
        for key, value in keys.items()
    }


def _side(content: str | Json | list[Json], role: str, path: str) -> list[Message]:
    """Return one side of a record (prompt, completion, chosen, rejected) as messages; a string is one of `role`."""
    name = path.removeprefix("$.")
    if isinstance(content, str):
        require_text(**{name: content})
        return [Message(role, content)]
    return [to_message(content, path, name)] if isinstance(content, dict) else to_messages(content, path)


def _as_context(messages: Sequence[Message]) -> list[Message]:
    """Return messages of which none is trained on."""
    return [replace(message, weight=0) if message.trained else message for message in messages]


def require_text(**texts: str) -> None:
    """Raise a DataError if one of the texts, by their keys, is empty."""
    for key, text in texts.items():
        if not text.strip():
            raise DataError(f"$.{key}: is empty")
