"""One record of a dataset: its forms, and what is wrong with it. Knows JSON; knows no tokens and no files.

However a file writes it, a record is one of five: a conversation, a prompt with its completion, a text, token ids, or
two answers to one prompt of which one is preferred.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, takewhile
from typing import Annotated, Any, TypeAlias

import msgspec

from loradeck.dataset.message import Json, Message, Turn, messages, tools
from loradeck.errors import DataError

UNSUPERVISED = -100  # torch.nn.functional.cross_entropy's ignore_index
PAIRS = "preference pairs"
EXPECTED = "messages, prompt and completion, text, alpaca, sharegpt, tokens and labels, or chosen and rejected"

Span: TypeAlias = tuple[str, bool]  # a text, and whether it is learned


@dataclass(frozen=True, slots=True)
class Conversation:
    """Every assistant turn is learned, but for those of weight 0."""

    messages: list[Message]
    tools: list[Json] | None = None
    form: str = field(default="messages", compare=False)

    def segments(self) -> list[Span]:
        """Return the record as it reads without a tokenizer."""
        declared = [(msgspec.json.encode(self.tools).decode(), False)] if self.tools else []
        return declared + [(str(message), message.learned) for message in self.messages]


@dataclass(frozen=True, slots=True)
class Completion:
    """The completion is learned; the prompt is a user's turn where the base has a chat template."""

    prompt: str
    completion: str
    form: str = field(default="prompt and completion", compare=False)

    def segments(self) -> list[Span]:
        """Return the record as it reads without a tokenizer."""
        return [(self.prompt, False), (self.completion, True)]


@dataclass(frozen=True, slots=True)
class Text:
    """All of it is learned, as plain text."""

    text: str
    form: str = field(default="text", compare=False)

    def segments(self) -> list[Span]:
        """Return the record as it reads without a tokenizer."""
        return [(self.text, True)]


@dataclass(frozen=True, slots=True)
class Tokens:
    """`labels[t]` is `tokens[t]` where it is learned, UNSUPERVISED elsewhere."""

    tokens: list[int]
    labels: list[int]
    form: str = field(default="tokens", compare=False)

    def segments(self) -> list[Span]:
        """Return the ids with blanks between them."""
        pairs = zip(self.tokens, self.labels, strict=True)
        runs = groupby(pairs, key=lambda pair: pair[1] != UNSUPERVISED)
        return [(" ".join(str(token) for token, _ in run), learned) for learned, run in runs]


@dataclass(frozen=True, slots=True)
class Pair:
    """Two records that differ in the answer; the chosen one is preferred."""

    chosen: Conversation | Completion
    rejected: Conversation | Completion
    form: str = field(default=PAIRS, compare=False)

    def segments(self) -> list[Span]:
        """Return the prompt, the chosen answer and the rejected one."""
        chosen, rejected = self.chosen.segments(), self.rejected.segments()
        shared = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))))
        return chosen + rejected[shared:]


Record: TypeAlias = Conversation | Completion | Text | Tokens | Pair


class _Messages(msgspec.Struct, frozen=True):
    messages: list[Turn]
    tools: list[Json] | str | None = None

    def record(self) -> Record:
        return _conversation(messages(self.messages, "$.messages"), self.tools, "$.messages")


class _ShareGpt(msgspec.Struct, frozen=True):
    conversations: list[Turn]
    system: str | None = None
    tools: list[Json] | str | None = None

    def record(self) -> Record:
        system = [Message("system", self.system)] if self.system else []
        turns = messages(self.conversations, "$.conversations")
        return replace(_conversation(system + turns, self.tools, "$.conversations"), form="sharegpt")


class _Alpaca(msgspec.Struct, frozen=True):
    instruction: str
    output: str
    input: str | None = None
    system: str | None = None
    history: list[tuple[str, str]] | None = None

    def record(self) -> Record:
        # The instruction, a line feed, the input; and answers of the history are learned too: as LLaMA-Factory does.
        turns = [Message("system", self.system)] if self.system else []
        asked = "\n".join(filter(None, [self.instruction, self.input]))
        for user, assistant in [*(self.history or []), (asked, self.output)]:
            turns += [Message("user", user), Message("assistant", assistant)]
        _full(instruction=asked, output=self.output)
        return replace(_conversation(turns, None, "$.history"), form="alpaca")


class _Completion(msgspec.Struct, frozen=True):
    prompt: str | list[Turn]
    completion: str | Turn | list[Turn]
    tools: list[Json] | str | None = None
    label: Any = None
    kto_tag: Any = None

    def record(self) -> Record:
        if isinstance(self.label, bool) or self.kto_tag is not None:
            raise DataError("$.label: judges the completion, as for KTO, and a bad one would be learned; keep the good")
        if isinstance(self.prompt, str) and isinstance(self.completion, str):
            _full(prompt=self.prompt, completion=self.completion)
            return Completion(self.prompt, self.completion)
        asked = _read(_side(self.prompt, "user", "$.prompt"))
        made = _conversation(asked + _side(self.completion, "assistant", "$.completion"), self.tools, "$.completion")
        return replace(made, form="prompt and completion")


class _Text(msgspec.Struct, frozen=True):
    text: str

    def record(self) -> Record:
        _full(text=self.text)
        return Text(self.text)


class _Tokens(msgspec.Struct, frozen=True):
    labels: list[int]
    tokens: list[Annotated[int, msgspec.Meta(ge=0)]] | None = None
    input_ids: list[Annotated[int, msgspec.Meta(ge=0)]] | None = None

    def record(self) -> Record:
        key, ids = ("tokens", self.tokens) if self.tokens is not None else ("input_ids", self.input_ids or [])
        if len(ids) != len(self.labels):
            raise DataError(f"$.labels: are {len(self.labels)}, but {key} are {len(ids)}")
        for at, (token, label) in enumerate(zip(ids, self.labels, strict=True)):
            if label not in (token, UNSUPERVISED):
                raise DataError(f"$.labels[{at}]: is {label}, neither {UNSUPERVISED} nor {key}[{at}], {token}")
        if all(label == UNSUPERVISED for label in self.labels[1:]):
            raise DataError(f"$.labels: nothing is learned; all after the first are {UNSUPERVISED}")
        return Tokens(ids, self.labels)


class _Preference(msgspec.Struct, frozen=True):
    chosen: str | Turn | list[Turn]
    rejected: str | Turn | list[Turn]
    prompt: str | list[Turn] | None = None
    conversations: list[Turn] | None = None
    tools: list[Json] | str | None = None

    def record(self) -> Record:
        if isinstance(self.prompt, str) and isinstance(self.chosen, str) and isinstance(self.rejected, str):
            _full(prompt=self.prompt, chosen=self.chosen, rejected=self.rejected)
            sides = [Completion(self.prompt, self.chosen), Completion(self.prompt, self.rejected)]
        else:
            key = "prompt" if self.prompt is not None else "conversations"
            prompt = _side(self.prompt if self.prompt is not None else self.conversations or [], "user", f"$.{key}")
            sides = [
                _conversation(turns, self.tools, f"$.{side}")
                for side, turns in zip(("chosen", "rejected"), self._whole(prompt), strict=True)
            ]
        if sides[0] == sides[1]:
            raise DataError("$.rejected: is the same as chosen, so neither is preferred")
        return Pair(sides[0], sides[1])

    def _whole(self, prompt: list[Message]) -> list[list[Message]]:
        """Return both conversations, of which only what they do not share is learned."""
        sides = [_side(self.chosen, "assistant", "$.chosen"), _side(self.rejected, "assistant", "$.rejected")]
        if all(side and side[0].role == "assistant" for side in sides):
            if not prompt:
                raise DataError("$.prompt: is missing, and chosen and rejected are answers only")
            return [_read(prompt) + side for side in sides]
        shared = [own for own, other in takewhile(lambda pair: pair[0] == pair[1], zip(*sides, strict=False))]
        if shared == sides[0] == sides[1]:
            return sides  # refused as the same
        if shared[len(shared) - len(prompt) :] != prompt:
            raise DataError("$.prompt: chosen and rejected are whole conversations, and do not begin with it")
        for key, side in zip(("chosen", "rejected"), sides, strict=True):
            if len(side) == len(shared) or side[len(shared)].role != "assistant":
                raise DataError(f"$.{key}: does not go on with an assistant's turn where the two begin to differ")
        return [_read(shared) + side[len(shared) :] for side in sides]


# A record is of the first form whose keys it has: many a dataset of a later one adds its own rendering as text.
FORMS: tuple[tuple[Any, set[str]], ...] = (
    (_Preference, {"chosen", "rejected"}),
    (_Tokens, {"tokens", "labels"}),
    (_Tokens, {"input_ids", "labels"}),
    (_Messages, {"messages"}),
    (_ShareGpt, {"conversations"}),
    (_Completion, {"prompt", "completion"}),
    (_Alpaca, {"instruction", "output"}),
    (_Text, {"text"}),
)


def parse(line: bytes) -> Record:
    """Read one line of JSON; keys beyond those of its form are passed over, and those that are null.

    Raises:
        DataError: the line is none of the forms. The message is `path: what`, as in `$.messages[0].role: is …`.
    """
    try:
        text = line.decode("utf-8-sig")  # some editors begin a file with a byte order mark
        fields = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        keys = [key for key, value in fields.items() if bytes(value) != b"null"]
        form = next((form for form, needed in FORMS if needed <= set(keys)), None)
        if form is None:
            shown = ", ".join(f"{key!r:.24}" for key in keys[:5]) or "none"
            raise DataError(f"$: none of {EXPECTED}; its keys are {shown}")
        record: Record = msgspec.json.decode(text, type=form).record()
    except UnicodeDecodeError as error:
        raise DataError(f"byte {error.start} is not UTF-8") from error
    except RecursionError as error:
        raise DataError("is nested too deeply") from error
    except msgspec.DecodeError as error:
        what, _, where = str(error).partition(" - at ")
        raise DataError(f"{where.strip('`') or '$'}: {what}") from error
    return record


def _side(said: str | Turn | list[Turn], role: str, path: str) -> list[Message]:
    """Return one side of a record as turns; a string is one turn of `role`."""
    if isinstance(said, str):
        _full(**{path.removeprefix("$."): said})
        return [Message(role, said)]
    return [said.message(path)] if isinstance(said, Turn) else messages(said, path)


def _read(turns: Sequence[Message]) -> list[Message]:
    """Return turns of which none is learned."""
    return [replace(turn, weight=0) if turn.learned else turn for turn in turns]


def _conversation(turns: list[Message], declared: list[Json] | str | None, path: str) -> Conversation:
    """Put turns together.

    Raises:
        DataError: an answer to nothing, or nothing to learn.
    """
    if turns and turns[0].role == "assistant":
        raise DataError(f"{path}[0].role: is assistant, with nothing to answer")
    if not any(turn.learned for turn in turns):
        raise DataError(f"{path}: has no assistant turn to learn")
    return Conversation(turns, tools(declared))


def _full(**texts: str) -> None:
    for key, text in texts.items():
        if not text.strip():
            raise DataError(f"$.{key}: is empty")
