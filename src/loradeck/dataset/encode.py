"""Encode a record: the tokens of each of its sequences, and which of them are trained on."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TypeAlias

from transformers import PreTrainedTokenizerBase

from loradeck.dataset.control import StandIns, control_pattern
from loradeck.dataset.message import Message
from loradeck.dataset.record import (
    UNSUPERVISED,
    Completion,
    Conversation,
    LabelledText,
    PlainText,
    PreferencePair,
    Record,
    Span,
    TaggedWords,
    TokenIds,
)
from loradeck.dataset.template import fold_system, marks, sequences
from loradeck.errors import DataError

Encoded: TypeAlias = tuple[list[int], list[int]]  # tokens and labels


@dataclass(frozen=True, slots=True)
class Encoder:
    """Encodes records for a base. What a record holds twice, or what is read otherwise than written, is a remark."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    fold_system: bool = False
    """Put system messages into the user's where the chat template has no place for them."""
    remarks: set[str] = field(default_factory=set)

    def encode(self, record: Record) -> list[Encoded]:
        """Return the tokens and labels of each sequence, possibly only the first `max_length` + 1 of them.

        Raises:
            DataError: the record does not fit the base, its tokenizer or its chat template.
        """
        chat = self.tokenizer.chat_template is not None
        if isinstance(record, Completion) and chat:
            record = Conversation([Message("user", record.prompt), Message("assistant", record.completion)])
        match record:
            case Conversation() if not chat:
                raise DataError(
                    "$: the base has no chat template for conversations; give prompt and completion, or text"
                )
            case Conversation():
                return self._conversation(record)
            case Completion():
                return [self._plain(record.spans())]
            case PlainText():
                return _chunks(*self._plain(record.spans()), self.max_length)
            case TokenIds():
                size = len(self.tokenizer)
                if invalid := next((token for token in record.tokens if token >= size), None):
                    raise DataError(f"$: token {invalid} is outside the base's vocabulary of {size}")
                return [(record.tokens, record.labels)]
            case PreferencePair():
                raise DataError("$: a preference pair makes two sequences")
            case LabelledText() | TaggedWords():
                raise DataError("$: has labels, which a language model does not learn")

    def _conversation(self, conversation: Conversation) -> list[Encoded]:
        template, control = marks(self.tokenizer), control_pattern(self.tokenizer)
        messages = conversation.messages
        if len(messages) == 2 and not conversation.tools and self._is_rendered(messages[0].content):
            return [self._rendered(messages[0].content, messages[1].content)]
        if self.fold_system and not template.places_system:
            messages = fold_system(messages)
        if template.begin and messages[0].content.lstrip().startswith(template.begin):
            self.remarks.add(f"begins with {template.begin}, as every text does; it is not added twice")
            messages = [
                replace(messages[0], content=messages[0].content.lstrip().removeprefix(template.begin)),
                *messages[1:],
            ]
        messages = [
            replace(message, content=self._without_end(message.content)) if message.role == "assistant" else message
            for message in messages
        ]
        for message in messages:
            if control.search(template.answer) and template.answer in message.content:
                self.remarks.add(
                    "holds, within a message, a text that the chat template has already rendered; give it as text"
                )
            for token in control.findall(message.content):
                self.remarks.add(f"holds the control token {token} within a message; it is read as text")
        stand_ins = StandIns(self.tokenizer)
        conversation = stand_ins.replace_in(replace(conversation, messages=messages))
        return [self._tokenize(spans, stand_ins) for spans in sequences(self.tokenizer, conversation)]

    def _is_rendered(self, prompt: str) -> bool:
        answer = marks(self.tokenizer).answer
        return bool(answer) and prompt.rstrip().endswith(answer)

    def _rendered(self, prompt: str, completion: str) -> Encoded:
        """Encode a prompt that the chat template has already rendered, and its completion."""
        self.remarks.add("the prompt is already rendered by the chat template; it is not rendered again")
        template, stand_ins = marks(self.tokenizer), StandIns(self.tokenizer)
        begin = "" if prompt.startswith(template.begin) else template.begin
        completion = stand_ins.replace(self._without_end(completion))
        prompt = stand_ins.replace(begin + prompt, control=False)
        return self._tokenize([Span(prompt, trained=False), Span(completion + template.end, trained=True)], stand_ins)

    def _without_end(self, answer: str) -> str:
        """Return an answer without the end of a turn or of a text that is about to follow it.

        Raises:
            DataError: nothing is left.
        """
        content = answer
        while mark := self._end_of(content):
            self.remarks.add(f"an answer already ends with {mark}; it is not added twice")
            content = content.rstrip().removesuffix(mark)
        if not content.strip() and answer.strip():
            raise DataError("$: an answer is empty but for its end")
        return content

    def _end_of(self, text: str) -> str:
        """Return the mark of an end with which a text ends."""
        ends = (marks(self.tokenizer).end, str(self.tokenizer.eos_token or ""))
        return next((end for end in ends if end and text.rstrip().endswith(end)), "")

    def _plain(self, spans: list[Span]) -> Encoded:
        """Tokenize a text without a template, between the tokenizer's own begin and end of text."""
        end = self.tokenizer.eos_token_id
        if end is None:
            raise DataError("$: the base's tokenizer has no end-of-text token, so the adapter could not learn to stop")
        last = spans[-1]
        mark = self._end_of(last.text)
        tokens, labels = self._tokenize([*spans[:-1], last._replace(text=last.text.rstrip()) if mark else last])
        begin = _begin(self.tokenizer)
        if begin and tokens[: len(begin)] == begin:
            self.remarks.add("already begins with the begin-of-text token; it is not added twice")
            tokens, labels = tokens[len(begin) :], labels[len(begin) :]
        tokens, labels = [*begin, *tokens], [*[UNSUPERVISED] * len(begin), *labels]
        if mark:
            self.remarks.add(f"already ends with {mark}; no end is added")
            return tokens, labels
        return [*tokens, end], [*labels, end]

    def _tokenize(self, spans: Iterable[Span], stand_ins: StandIns | None = None) -> Encoded:
        """Tokenize span after span; of a conversation, which has `stand_ins`, only `max_length` + 1 tokens.

        A span gets the tokens it has within the whole text, because some tokenizers mark a text's first word. The
        exception is a merge across the span's start: at inference the prompt is tokenized without the answer.
        """
        text = ""
        tokens: list[int] = []
        labels: list[int] = []
        for span in spans:
            text += span.text
            joint = self._ids(text, stand_ins)
            new = joint[len(tokens) :] if joint[: len(tokens)] == tokens else self._ids(span.text, stand_ins)
            tokens += new
            labels += new if span.trained else [UNSUPERVISED] * len(new)
            if stand_ins is not None and len(tokens) > self.max_length:
                break
        return tokens, labels

    def _ids(self, text: str, stand_ins: StandIns | None) -> list[int]:
        if stand_ins is not None and stand_ins.texts:
            return stand_ins.tokenize(text)
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # else it warns of long texts


@lru_cache(maxsize=8)
def _begin(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens with which the tokenizer begins every text."""
    text = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    return next((whole[:at] for at in range(len(whole)) if whole[at : at + len(text)] == text), [])


def _chunks(tokens: list[int], labels: list[int], max_length: int) -> list[tuple[list[int], list[int]]]:
    """Split a sequence into chunks; each after the first begins with the token before it, as context only."""
    starts = range(max_length - 1, len(tokens) - 1, max_length - 1)
    rest = [(tokens[at : at + max_length], [UNSUPERVISED, *labels[at + 1 : at + max_length]]) for at in starts]
    return [(tokens[:max_length], labels[:max_length]), *rest]
