"""The door between text and token ids; inside, everything is ids. Knows tokenizers and chat templates, no model."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from loradeck.errors import ConfigError

Message: TypeAlias = Mapping[str, Any]  # {"role": "user", "content": "..."}
Prompt: TypeAlias = str | Sequence[Message] | Sequence[int]
CONTEXT = 16  # tokens before a text that can matter to it


def encode(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Turn a prompt into token ids, up to where the model's answer begins.

    With a chat template a string is one message of the user; without one it is plain text to be continued. Token ids
    stay as they are.

    Raises:
        ConfigError: messages that are none, that the base has no template for or its template refuses; no token at all.
    """
    if isinstance(prompt, str):
        messages: Sequence[Message] = [{"role": "user", "content": prompt}]
    elif prompt and all(isinstance(token, int) for token in prompt):
        return _known(tokenizer, cast("Sequence[int]", prompt))
    else:
        messages = cast("Sequence[Message]", prompt)
        _check(messages)
    if tokenizer.chat_template is not None:
        try:
            ids = tokenizer.apply_chat_template([*map(dict, messages)], add_generation_prompt=True, return_dict=False)
        except Exception as error:  # a template is a stranger's program and can fail in any way
            raise ConfigError(
                f"the base's chat template refuses the messages: {error}",
                hint="Give the roles and the order of messages that this base was trained with.",
            ) from error
    elif isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    else:
        raise ConfigError(
            "the base's tokenizer has no chat template, so it takes no messages",
            hint="Give the prompt as one string, or take a base tuned for chat.",
        )
    if not ids:
        raise ConfigError("the prompt is empty", hint="Give at least one token to go on from.")
    return cast("list[int]", ids)  # a list of strings, or of lists, is for a batch


def _known(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[int]:
    unknown = [token for token in ids if not 0 <= token < len(tokenizer)]
    if unknown:
        raise ConfigError(f"{unknown[0]} is no token of the base, which has {len(tokenizer)}", hint="Give token ids.")
    return [*ids]


def decode(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> str:
    """Turn token ids into text, without special tokens and without an unfinished character at the end."""
    return "".join(map(Detokenizer(tokenizer).push, ids))


class Detokenizer:
    """Text as its tokens arrive. A character of several tokens comes with its last one; special tokens are left out."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, before: Sequence[int] = ()) -> None:
        """`before` are tokens that the text goes on from: without any, some tokenizers take the first word's space."""
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._given = 0  # of them, those whose text was given; they stay, because text depends on what is before it
        for token in before[-CONTEXT:]:
            self.push(token)

    def push(self, token: int) -> str:
        """Return the text that `token` completes, which may be none."""
        self._ids.append(token)
        text = self._text(self._ids)
        if text.endswith("\ufffd"):  # the first bytes of a character
            return ""
        piece = text[len(self._text(self._ids[: self._given])) :]
        if piece:
            self._ids, self._given = self._ids[self._given :], len(self._ids) - self._given
        return piece

    def _text(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def pad_left(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Return `input_ids` and `attention_mask`, both (rows, longest) int64: every row ends at the right edge."""
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def stop_ids(tokenizer: PreTrainedTokenizerBase, settings: GenerationConfig | None) -> frozenset[int]:
    """Return the ids that end a turn: the tokenizer's end of text, and those of the model's generation settings."""
    ends = settings.eos_token_id if settings is not None else None
    listed = ends if isinstance(ends, Iterable) else [ends]
    return frozenset(end for end in (tokenizer.eos_token_id, *listed) if end is not None)


def chat_template_hash(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the sha256, in hex, of the chat template; None where there is none."""
    template = tokenizer.chat_template
    if template is None:
        return None
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _check(messages: Sequence[Message]) -> None:
    problems = [
        f"message {at} is {message!r:.80}"
        for at, message in enumerate(messages)
        if not isinstance(message, Mapping)
        or not isinstance(message.get("role"), str)
        or not isinstance(message.get("content"), str)
    ]
    if problems or not messages:
        raise ConfigError(
            "a prompt is a string or a list of messages" if problems else "the list of messages is empty",
            problems,
            hint='A message is {"role": "user", "content": "some text"}.',
        )
