"""What the model reads and what of it is learned, token by token. Knows tokenizers and chat templates; knows no files.

A mask is right when decoding the learned tokens gives the answers and the marks that end them, no more and no less.
Few chat templates mark the assistant's tokens themselves, so a conversation is rendered turn by turn, each rendering a
prefix of the next.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self, TypeAlias

from transformers import PreTrainedTokenizerBase

from loradeck.errors import DataError
from loradeck.train.record import Completion, Conversation, Message, Record, Text

UNSUPERVISED = -100  # torch.nn.functional.cross_entropy's ignore_index
ANSWER = "\N{OBJECT REPLACEMENT CHARACTER}"  # stands in for an answer, to see what the template writes around it

Segment: TypeAlias = tuple[str, bool]  # a text, and whether it is learned


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence. `labels[t]` is `tokens[t]` where it is learned, UNSUPERVISED elsewhere."""

    tokens: list[int]
    labels: list[int]
    truncated: bool = False

    @classmethod
    def of(cls, record: Record, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Self:
        """Turn a record into tokens and labels, cut at `max_length` tokens.

        What ends an answer is learned with it: the template's end of turn, or the tokenizer's end of text.

        Raises:
            DataError: the chat template does not fit the record, or nothing to learn is left after the cut.
        """
        chat = tokenizer.chat_template is not None
        if isinstance(record, Completion) and chat:
            record = Conversation([Message("user", record.prompt), Message("assistant", record.completion)])
        match record:
            case Conversation() if not chat:
                raise DataError("$.messages: the base's tokenizer has no chat template; give prompt and completion")
            case Conversation():
                tokens, labels = _tokenize(tokenizer, _conversation(tokenizer, record.messages), max_length)
            case Completion():
                tokens, labels = _plain(tokenizer, [(record.prompt, False), (record.completion, True)], max_length)
            case Text():
                tokens, labels = _plain(tokenizer, [("", False), (record.text, True)], max_length)
        example = cls(tokens[:max_length], labels[:max_length], truncated=len(tokens) > max_length)
        if not example.supervised:
            raise DataError(f"nothing to learn is left within max_length, {max_length} tokens")
        return example

    @property
    def supervised(self) -> int:
        """Tokens that are learned; the first is read, never predicted."""
        return sum(label != UNSUPERVISED for label in self.labels[1:])


def _plain(tokenizer: PreTrainedTokenizerBase, segments: list[Segment], max_length: int) -> tuple[list[int], list[int]]:
    """Tokenize a text as it stands, begun and ended as the tokenizer begins and ends texts."""
    end = tokenizer.eos_token_id
    if end is None:
        raise DataError("the base's tokenizer has no end of text, so the adapter could not learn to stop")
    tokens, labels = _tokenize(tokenizer, segments, max_length, special=True)
    return [*tokens, end], [*labels, end]


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, segments: Iterable[Segment], max_length: int, *, special: bool = False
) -> tuple[list[int], list[int]]:
    """Tokenize segment after segment, stopping once past `max_length` tokens.

    `special` lets the tokenizer begin the text as it does every text; a chat template has done so itself.
    A segment's tokens are those it has in the whole text, for some tokenizers mark a text's first word; unless a merge
    would cross its border: at inference the prompt is tokenized without the answer.
    """
    text = ""
    tokens: list[int] = []
    labels: list[int] = []
    for segment, learned in segments:
        text += segment
        joint = tokenizer(text, add_special_tokens=special)["input_ids"]
        if joint[: len(tokens)] == tokens:
            fresh = joint[len(tokens) :]
        else:
            fresh = tokenizer(segment, add_special_tokens=False)["input_ids"]
        tokens += fresh
        labels += fresh if learned else [UNSUPERVISED] * len(fresh)
        if len(tokens) > max_length:
            break
    return tokens, labels


def _conversation(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> Iterator[Segment]:
    """Yield what is read before each assistant turn, then the turn up to its end."""
    done = ""
    for at, message in enumerate(messages):
        if message.role != "assistant":
            continue
        prompt = _render(tokenizer, messages[:at], add_generation_prompt=True)
        marked = _render(tokenizer, [*messages[:at], Message("assistant", ANSWER)])
        reply = _render(tokenizer, messages[: at + 1])
        head, _, end = marked.removeprefix(prompt).partition(ANSWER)
        end = end.rstrip()  # white space after the end of a turn is never generated
        answer = reply.rstrip().removeprefix(prompt + head).removesuffix(end)
        if not prompt.startswith(done) or prompt + head + answer + end != reply.rstrip():
            raise DataError(f"$.messages[{at}]: the chat template does not render a conversation as a prefix of itself")
        if answer.strip() != message.content.strip():
            raise DataError(f"$.messages[{at}].content: the chat template rewrites it")
        if not end:
            raise DataError("the chat template marks no end of a turn, so the adapter could not learn to stop")
        yield (prompt + head)[len(done) :], False
        yield answer + end, True
        done = prompt + head + answer + end


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, add_generation_prompt: bool = False
) -> str:
    conversation = [{"role": message.role, "content": message.content} for message in messages]
    try:
        return str(
            tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=add_generation_prompt)
        )
    except Exception as error:  # a template is a stranger's program and can fail in any way
        raise DataError(f"$.messages: the base's chat template refuses them: {str(error)!r:.100}") from error
