"""Text to token ids and back: prompts, chat templates, and decoding token by token."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from loradeck.base.chat_template import Message, encode_chat, ignored_tools
from loradeck.errors import ConfigError

Prompt: TypeAlias = str | Sequence[Message] | Sequence[int]
CONTEXT = 16  # tokens before a text that can change how it is decoded


def encode(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Return a prompt's token ids, up to where the model's answer begins.

    A string is one user message if the tokenizer has a chat template; otherwise it is plain text to continue. Token ids
    are returned as they are.

    Raises:
        ConfigError: invalid messages; no chat template for them, or one that rejects them or ignores their tool calls;
            an unknown id, or no token.
    """
    if isinstance(prompt, str):
        message = {"role": "user", "content": prompt}
        ids = tokenizer(prompt)["input_ids"] if tokenizer.chat_template is None else encode_chat(tokenizer, [message])
    elif prompt and all(isinstance(token, int) for token in prompt):
        ids = check_ids(tokenizer, cast("Sequence[int]", prompt))
    else:
        messages = cast("Sequence[Message]", prompt)
        _check(messages)
        if ignored := ignored_tools(tokenizer, messages, None):
            raise ConfigError(f"the chat template ignores {ignored}", hint="Leave them out, or use another base.")
        ids = encode_chat(tokenizer, messages)
    if not ids:
        raise ConfigError("the prompt is empty", hint="Give at least one token.")
    return cast("list[int]", ids)  # other types are for batches


def check_ids(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[int]:
    """Return `ids` if the tokenizer has them all.

    Raises:
        ConfigError: an unknown id.
    """
    unknown = [token for token in ids if not 0 <= token < len(tokenizer)]
    if unknown:
        raise ConfigError(f"unknown token id {unknown[0]}", hint=f"The tokenizer's ids are 0 to {len(tokenizer) - 1}.")
    return [*ids]


def decode(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> str:
    """Return the text of token ids, without special tokens and without an incomplete character at the end."""
    return "".join(map(Detokenizer(tokenizer).push, ids))


class Detokenizer:
    """Decodes token by token. A character of several tokens appears with its last one; special tokens are left out."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, before: Sequence[int] = ()) -> None:
        """`before` are the tokens that the text continues; without them some tokenizers drop the first word's space."""
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._returned = 0  # leading ids whose text was returned; kept because the next token's text depends on them
        for token in before[-CONTEXT:]:
            self.push(token)

    def push(self, token: int) -> str:
        """Return the text that `token` completes, possibly empty."""
        self._ids.append(token)
        text = self._text(self._ids)
        if text.endswith("\ufffd"):  # the first bytes of a character
            return ""
        piece = text[len(self._text(self._ids[: self._returned])) :]
        if piece:
            self._ids, self._returned = self._ids[self._returned :], len(self._ids) - self._returned
        return piece

    def _text(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def pad_left(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Return `input_ids` and `attention_mask`, both (rows, longest) int64; rows are padded on the left."""
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def stop_ids(tokenizer: PreTrainedTokenizerBase, settings: GenerationConfig | None) -> frozenset[int]:
    """Return the ids that end an answer: the tokenizer's EOS and those of the model's generation config."""
    ends = settings.eos_token_id if settings is not None else None
    listed = ends if isinstance(ends, Iterable) else [ends]
    return frozenset(end for end in (tokenizer.eos_token_id, *listed) if end is not None)


def chat_template_hash(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the sha256, in hex, of the chat template; None if the tokenizer has none."""
    template = tokenizer.chat_template
    if template is None:
        return None
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _check(messages: Sequence[Message]) -> None:
    problems = [
        f"message {index}: {message!r:.80}"
        for index, message in enumerate(messages)
        if not isinstance(message, Mapping)
        or not isinstance(message.get("role"), str)
        or not isinstance(message.get("content"), str)
    ]
    if problems or not messages:
        raise ConfigError(
            "invalid messages" if problems else "the list of messages is empty",
            problems,
            hint='A message is {"role": "user", "content": "some text"}.',
        )
