"""Text to ids and back: chat templates, padding, and characters that arrive in pieces."""

import hashlib
from copy import deepcopy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import ByT5Tokenizer, GenerationConfig, PreTrainedTokenizerFast

from loradeck.base.text import Detokenizer, chat_template_hash, decode, encode, pad_left, stop_ids
from loradeck.errors import ConfigError

TEXTS = st.text().filter(lambda text: not text.endswith("\ufffd"))  # at its end that means half a character
TEXT = "naïve café, 日本語, 👩‍🚀 and ä̈"


@pytest.fixture
def plain(tiny_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A tokenizer without a chat template."""
    tokenizer = deepcopy(tiny_tokenizer)
    tokenizer.chat_template = None
    return tokenizer


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_string_is_a_users_message(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = encode(tiny_tokenizer, "hi")
    assert tiny_tokenizer.decode(ids) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert ids == encode(tiny_tokenizer, [{"role": "user", "content": "hi"}])
    assert ids.count(1) == 2  # the special token, not its letters
    assert ids.count(2) == 1


def test_messages_keep_their_order(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant", "user")]
    text = tiny_tokenizer.decode(encode(tiny_tokenizer, turns))
    assert [part.split("\n")[0] for part in text.split("<|im_start|>")[1:]] == [
        *("system", "user", "assistant", "user"),
        "assistant",
    ]


def test_a_developer_is_the_system(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    user = {"role": "user", "content": "hi"}
    texts = {
        role: encode(tiny_tokenizer, [{"role": role, "content": "Rhyme."}, user]) for role in ("system", "developer")
    }
    assert texts["system"] == texts["developer"]


def test_tools_that_the_template_ignores_are_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    for message in ({"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "8"}):
        with pytest.raises(ConfigError, match="ignores tool"):
            encode(tiny_tokenizer, [{"role": "user", "content": "hi"}, message])


def test_without_a_template_a_string_is_plain_text(plain: PreTrainedTokenizerFast) -> None:
    assert encode(plain, "hi") == ids_of(plain, "hi")


def test_without_a_template_messages_are_refused(plain: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match=r"no chat template[\s\S]*as one text"):
        encode(plain, [{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    ("messages", "word"),
    [
        ([], "empty"),
        ([{"role": "user"}], "message 0"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": None}], "message 1"),
        (["hi"], "message 0: 'hi'"),
        ({"role": "user", "content": "hi"}, "message 0: 'role'"),
    ],
)
def test_invalid_messages_are_refused(tiny_tokenizer: PreTrainedTokenizerFast, messages: list, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        encode(tiny_tokenizer, messages)


@pytest.mark.parametrize("template", ["{{ raise_exception('users only') }}", "{{ 1 + 'a' }}", "{% if %}", {"a": "b"}])
def test_a_template_that_fails_is_reported(plain: PreTrainedTokenizerFast, template: str) -> None:
    plain.chat_template = template
    with pytest.raises(ConfigError, match="chat template rejects"):
        encode(plain, "hi")


def test_no_tokens_are_refused(plain: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match="empty"):
        encode(plain, "")


def test_pieces_break_no_character(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = ids_of(tiny_tokenizer, TEXT)
    detokenizer = Detokenizer(tiny_tokenizer)
    pieces = [detokenizer.push(token) for token in ids]
    assert len(ids) == len(TEXT.encode())  # one token per byte: every wide character arrives in pieces
    assert "".join(pieces) == TEXT
    assert set(pieces) - {""} == set(TEXT)


@given(text=TEXTS)
def test_decode_is_the_inverse(tiny_tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert decode(tiny_tokenizer, ids_of(tiny_tokenizer, text)) == text


def test_decode_drops_special_tokens_and_half_a_character(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = ids_of(tiny_tokenizer, "a語")
    assert decode(tiny_tokenizer, [1, *ids, 2]) == "a語"
    assert decode(tiny_tokenizer, ids[:-1]) == "a"
    assert decode(tiny_tokenizer, []) == ""


@given(ids=st.lists(st.integers(3, 260), max_size=12))
def test_any_tokens_decode_as_the_tokenizer_does(spaced_tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> None:
    whole = spaced_tokenizer.decode(ids)
    assert decode(spaced_tokenizer, ids) == whole or "\ufffd" in whole


@given(text=TEXTS)
def test_decode_is_the_inverse_where_words_begin_with_their_space(
    spaced_tokenizer: PreTrainedTokenizerFast, text: str
) -> None:
    assert decode(spaced_tokenizer, ids_of(spaced_tokenizer, text)) == text.replace("▁", " ")


def test_a_text_that_goes_on_keeps_its_space(spaced_tokenizer: PreTrainedTokenizerFast) -> None:
    before, word = ids_of(spaced_tokenizer, "a b"), ids_of(spaced_tokenizer, "c")
    assert Detokenizer(spaced_tokenizer).push(word[0]) == "c"
    assert Detokenizer(spaced_tokenizer, before).push(word[0]) == " c"
    assert Detokenizer(spaced_tokenizer, before * 20).push(word[0]) == " c"


def test_a_character_begun_before_is_finished(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    *before, last = ids_of(tiny_tokenizer, "a語")
    assert Detokenizer(tiny_tokenizer, before).push(last) == "語"


def test_a_tokenizer_in_python_detokenizes_too() -> None:
    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    assert decode(tokenizer, tokenizer(TEXT)["input_ids"]) == TEXT


def test_pad_left() -> None:
    ids, mask = pad_left([[5, 6, 7], [8]], 9)
    assert ids.tolist() == [[5, 6, 7], [9, 9, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert ids.dtype == mask.dtype == torch.int64


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (None, {2}),
        (GenerationConfig(), {2}),
        (GenerationConfig(eos_token_id=7), {2, 7}),
        (GenerationConfig(eos_token_id=[7, 8]), {2, 7, 8}),
    ],
)
def test_stop_ids(tiny_tokenizer: PreTrainedTokenizerFast, settings: GenerationConfig | None, expected: set) -> None:
    assert stop_ids(tiny_tokenizer, settings) == expected


def test_stop_ids_may_be_none_at_all(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    endless = deepcopy(tiny_tokenizer)
    endless.eos_token = None
    assert stop_ids(endless, None) == frozenset()


def test_chat_template_hash(tiny_tokenizer: PreTrainedTokenizerFast, plain: PreTrainedTokenizerFast) -> None:
    assert chat_template_hash(tiny_tokenizer) == hashlib.sha256(tiny_tokenizer.chat_template.encode()).hexdigest()
    assert chat_template_hash(plain) is None
    plain.chat_template = {"default": "a", "tools": "b"}
    named = chat_template_hash(plain)
    plain.chat_template = {"tools": "b", "default": "a"}
    assert chat_template_hash(plain) == named
