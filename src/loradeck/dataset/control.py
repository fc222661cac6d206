"""Control tokens in the contents of a record: a content neither ends its turn nor begins another.

A content that contains, as text, a token such as <|im_end|> would be read as the end of its turn. So such text is
replaced by a character of Unicode's private use while the chat template renders the conversation, and is then tokenized
as text.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from loradeck.dataset.message import Message
from loradeck.dataset.record import Completion, Conversation, PlainText, PreferencePair, Record
from loradeck.errors import DataError

PRIVATE = 0xF0000  # the first character of a plane for private use; it has 65,534
STAND_IN = re.compile(f"[{chr(PRIVATE)}-{chr(PRIVATE + 0xFFFD)}]")
# Special in some tokenizers, but part of an answer.
WRITTEN_BY_MODELS = re.compile(r"</?(think|tool_call|tool_calls|tool_response|tools)>")
# What control tokens look like, to find them without a tokenizer.
LIKELY = re.compile(r"<\|\w{1,32}\|>|\[/?INST\]|<(?:start|end)_of_turn>|</?s>|<[be]os>")


@lru_cache(maxsize=8)
def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return the tokens that a tokenizer finds in a text before it splits it into words, with their ids."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    tokens = {*special, *tokenizer.all_special_tokens} - {""}
    names = sorted((name for name in tokens if not WRITTEN_BY_MODELS.fullmatch(name)), key=len, reverse=True)
    ids = cast("list[int]", tokenizer.convert_tokens_to_ids(names))
    return dict(zip(names, ids, strict=True))


@lru_cache(maxsize=8)
def control_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Return a pattern, with a group, that finds a tokenizer's control tokens."""
    return re.compile(f"({'|'.join(map(re.escape, control_tokens(tokenizer))) or '(?!)'})")


@dataclass(slots=True)
class StandIns:
    """The characters that stand for control tokens in the contents of one record."""

    tokenizer: PreTrainedTokenizerBase
    texts: list[str] = field(default_factory=list)
    """The text that each of them stands for."""

    def replace_in(self, conversation: Conversation) -> Conversation:
        """Return a conversation without control tokens in what its messages and tools hold.

        Raises:
            DataError: it has some, and the tokenizer cannot read them as text.
        """
        messages = [self._message(message) for message in conversation.messages]
        declared = conversation.tools and [_map_texts(tool, self.replace) for tool in conversation.tools]
        return replace(conversation, messages=messages, tools=declared) if self.texts else conversation

    def _message(self, message: Message) -> Message:
        return replace(
            message,
            content=self.replace(message.content),
            reasoning=self.replace(message.reasoning),
            tool_calls=_map_texts(message.tool_calls, self.replace),
            name=message.name and self.replace(message.name),
        )

    def replace(self, text: str, *, control: bool = True) -> str:
        """Replace the control tokens in a text; a character that could be taken for a stand-in gets one, too."""
        text = STAND_IN.sub(self._stand_in, text)
        return control_pattern(self.tokenizer).sub(self._stand_in, text) if control else text

    def _stand_in(self, match: re.Match[str]) -> str:
        text = match[0]
        if text not in self.texts:
            if control_tokens(self.tokenizer).get(text, -1) in self._ids(text):
                raise DataError(f"$: contains {text}, which this tokenizer cannot read as text; remove it")
            self.texts.append(text)
        return chr(PRIVATE + self.texts.index(text))

    def restore(self, text: str) -> str:
        """Return a text with what the stand-ins stand for."""
        return STAND_IN.sub(lambda match: self.texts[ord(match[0]) - PRIVATE], text)

    def tokenize(self, text: str) -> list[int]:
        """Tokenize a text in which only the stand-ins are not to be read as control tokens."""
        ids: list[int] = []
        for at, piece in enumerate(control_pattern(self.tokenizer).split(text)):
            ids += [control_tokens(self.tokenizer)[piece]] if at % 2 else self._ids(self.restore(piece))
        return ids

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


def likely_tokens(record: Record) -> list[str]:
    """Return what looks like control tokens in a record."""
    sides = (record.chosen, record.rejected) if isinstance(record, PreferencePair) else (record,)
    texts: list[str] = []
    for side in sides:
        if isinstance(side, Conversation):
            texts += [text for message in side.messages for text in (message.content, message.reasoning)]
        elif isinstance(side, Completion):
            texts += [side.prompt, side.completion]
        elif isinstance(side, PlainText):
            texts.append(side.text)
    return list(dict.fromkeys(found for text in texts for found in LIKELY.findall(text)))


def _map_texts(value: Any, function: Callable[[str], str]) -> Any:
    """Return JSON with a function applied to all of its texts and keys."""
    if isinstance(value, str):
        return function(value)
    if isinstance(value, dict):
        return {function(key): _map_texts(item, function) for key, item in value.items()}
    return [_map_texts(item, function) for item in value] if isinstance(value, list) else value
