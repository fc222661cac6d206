"""Tokens by their text and bytes: incomplete characters, leading spaces, special tokens, and where each token begins."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from loradeck.api.logprobs import MIN_LOGPROB, LogprobFormatter
from loradeck.sampling import Token

CHARACTER = "語"


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str, *, special: bool = False) -> list[int]:
    return tokenizer(text, add_special_tokens=special)["input_ids"]


def test_chat_has_text_and_bytes(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    a, space, end = *ids_of(tiny_tokenizer, "a "), tiny_tokenizer.eos_token_id
    formatted = LogprobFormatter(tiny_tokenizer).chat(Token(a, -0.5, ((a, -0.5), (space, -1.0), (end, -2.0))))
    assert (formatted.token, formatted.logprob, formatted.bytes) == ("a", -0.5, [97])
    assert [top.token for top in formatted.top_logprobs] == ["a", " ", "<|im_end|>"]
    assert formatted.top_logprobs[1].bytes == [32]


@pytest.mark.parametrize("name", ["tiny_tokenizer", "spaced_tokenizer"])
def test_a_token_within_a_character_has_bytes_and_its_own_name(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)
    ids = ids_of(tokenizer, CHARACTER)[-3:]
    formatter = LogprobFormatter(tokenizer)
    tokens = [formatter.chat(Token(token, -1.0)) for token in ids]
    assert [token.token for token in tokens] == ["\\xe8", "\\xaa", "\\x9e"]
    assert bytes(byte for token in tokens for byte in token.bytes).decode() == CHARACTER
    tops = formatter.completion([Token(ids[0], -1.0, ((ids[0], -1.0), (ids[1], -2.0)))], [0])
    assert tops.tokens == ["bytes:\\xe8"]
    assert tops.top_logprobs == [{"bytes:\\xe8": -1.0, "bytes:\\xaa": -2.0}]


def test_words_keep_their_leading_space(spaced_tokenizer: PreTrainedTokenizerFast) -> None:
    formatter = LogprobFormatter(spaced_tokenizer)
    ids = ids_of(spaced_tokenizer, "a b")
    assert spaced_tokenizer.convert_ids_to_tokens(ids) == ["▁a", "▁b"]
    assert [formatter.chat(Token(token, -1.0)).token for token in ids] == [" a", " b"]
    assert formatter.text(ids) == "a b"
    assert formatter.offsets(ids, "a b") == [0, 1]


def test_what_precedes_the_text_has_no_offset(spaced_tokenizer: PreTrainedTokenizerFast) -> None:
    formatter = LogprobFormatter(spaced_tokenizer)
    ids = [spaced_tokenizer.bos_token_id, *ids_of(spaced_tokenizer, "a é c")]
    assert formatter.completion([Token(ids[0])], [0]).tokens == ["<s>"]
    assert formatter.offsets(ids, "a é c") == [0, 0, 1, 2, 3]


def test_a_token_within_a_character_begins_where_the_character_does(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = ids_of(tiny_tokenizer, "a語b<|im_end|>c")
    formatter = LogprobFormatter(tiny_tokenizer)
    assert formatter.offsets(ids, formatter.text(ids)) == [0, 1, 1, 1, 2, 3, 13]
    assert formatter.offsets(ids[:3], formatter.text(ids[:3])) == [0, 1, 1]  # cut within a character
    assert formatter.offsets(ids[2:5], formatter.text(ids[2:5])) == [0, 1, 2]  # no complete character


@pytest.mark.parametrize("name", ["tiny_tokenizer", "spaced_tokenizer"])
@given(text=st.text())
def test_offsets_cut_a_text_into_its_tokens(request: pytest.FixtureRequest, name: str, text: str) -> None:
    tokenizer = request.getfixturevalue(name)
    ids = ids_of(tokenizer, text)
    formatter = LogprobFormatter(tokenizer)
    whole = formatter.text(ids)
    offsets = [*formatter.offsets(ids, whole), len(whole)]
    assert offsets == sorted(offsets)
    formatted = formatter.completion([Token(token, -1.0) for token in ids], offsets[:-1]).tokens
    for token, start, stop in zip(formatted, offsets[:-1], offsets[1:], strict=True):
        if not token.startswith("bytes:") and whole[start:stop]:
            assert token.removeprefix(" " if start == 0 else "") in (
                whole[start:stop],
                whole[start:stop].removeprefix(" "),
            )


def test_a_token_is_among_its_most_likely_and_the_first_has_none(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    a, b, c = ids_of(tiny_tokenizer, "abc")
    formatted = LogprobFormatter(tiny_tokenizer).completion(
        [Token(a), Token(b, -3.0, ((c, -0.1),)), Token(c, -0.1)], [0, 1, 2]
    )
    assert formatted.token_logprobs == [None, -3.0, -0.1]
    assert formatted.top_logprobs == [None, {"c": -0.1, "b": -3.0}, {"c": -0.1}]
    assert formatted.text_offset == [0, 1, 2]


def test_impossible_tokens_have_a_finite_logprob(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    impossible = Token(5, -float("inf"), ((6, -float("inf")),))
    formatted = LogprobFormatter(tiny_tokenizer).chat(impossible)
    assert formatted.logprob == formatted.top_logprobs[0].logprob == MIN_LOGPROB
    assert LogprobFormatter(tiny_tokenizer).completion([impossible], [0]).token_logprobs == [MIN_LOGPROB]


def test_an_unknown_id_has_no_text(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    formatted = LogprobFormatter(tiny_tokenizer).chat(Token(len(tiny_tokenizer) + 1, -1.0))
    assert (formatted.token, formatted.bytes) == ("", [])
