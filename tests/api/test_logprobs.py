"""Tokens by their text and bytes: half characters, spaces that belong to words, special tokens; and where each begins."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from loradeck.api.logprobs import LEAST, Logprobs
from loradeck.sampling import Token

LANGUAGE = "語"


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str, *, special: bool = False) -> list[int]:
    return tokenizer(text, add_special_tokens=special)["input_ids"]


def test_chat_tells_text_and_bytes(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    a, space, end = *ids_of(tiny_tokenizer, "a "), tiny_tokenizer.eos_token_id
    told = Logprobs(tiny_tokenizer).chat(Token(a, -0.5, ((a, -0.5), (space, -1.0), (end, -2.0))))
    assert (told.token, told.logprob, told.bytes) == ("a", -0.5, [97])
    assert [top.token for top in told.top_logprobs] == ["a", " ", "<|im_end|>"]
    assert told.top_logprobs[1].bytes == [32]


@pytest.mark.parametrize("name", ["tiny_tokenizer", "spaced_tokenizer"])
def test_half_a_character_has_its_bytes_and_a_name_of_its_own(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)
    ids = ids_of(tokenizer, LANGUAGE)[-3:]
    words = Logprobs(tokenizer)
    told = [words.chat(Token(token, -1.0)) for token in ids]
    assert [own.token for own in told] == ["\\xe8", "\\xaa", "\\x9e"]
    assert bytes(byte for own in told for byte in own.bytes).decode() == LANGUAGE
    tops = words.completion([Token(ids[0], -1.0, ((ids[0], -1.0), (ids[1], -2.0)))], [0])
    assert tops.tokens == ["bytes:\\xe8"]
    assert tops.top_logprobs == [{"bytes:\\xe8": -1.0, "bytes:\\xaa": -2.0}]


def test_words_have_their_space(spaced_tokenizer: PreTrainedTokenizerFast) -> None:
    words = Logprobs(spaced_tokenizer)
    ids = ids_of(spaced_tokenizer, "a b")
    assert spaced_tokenizer.convert_ids_to_tokens(ids) == ["▁a", "▁b"]
    assert [words.chat(Token(token, -1.0)).token for token in ids] == [" a", " b"]
    assert words.text(ids) == "a b"
    assert words.places(ids, "a b") == [0, 1]


def test_what_comes_before_a_text_has_no_place(spaced_tokenizer: PreTrainedTokenizerFast) -> None:
    words = Logprobs(spaced_tokenizer)
    ids = [spaced_tokenizer.bos_token_id, *ids_of(spaced_tokenizer, "a é c")]
    assert words.completion([Token(ids[0])], [0]).tokens == ["<s>"]
    assert words.places(ids, "a é c") == [0, 0, 1, 2, 3]


def test_a_token_within_a_character_is_where_that_begins(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = ids_of(tiny_tokenizer, "a語b<|im_end|>c")
    words = Logprobs(tiny_tokenizer)
    assert words.places(ids, words.text(ids)) == [0, 1, 1, 1, 2, 3, 13]
    assert words.places(ids[:3], words.text(ids[:3])) == [0, 1, 1]  # it is cut
    assert words.places(ids[2:5], words.text(ids[2:5])) == [0, 1, 2]  # no character at all


@pytest.mark.parametrize("name", ["tiny_tokenizer", "spaced_tokenizer"])
@given(text=st.text())
def test_every_character_is_some_tokens(request: pytest.FixtureRequest, name: str, text: str) -> None:
    tokenizer = request.getfixturevalue(name)
    ids = ids_of(tokenizer, text)
    words = Logprobs(tokenizer)
    whole = words.text(ids)
    places = [*words.places(ids, whole), len(whole)]
    assert places == sorted(places)
    told = words.completion([Token(token, -1.0) for token in ids], places[:-1]).tokens
    for token, start, stop in zip(told, places[:-1], places[1:], strict=True):
        if not token.startswith("bytes:") and whole[start:stop]:
            assert token.removeprefix(" " if start == 0 else "") in (
                whole[start:stop],
                whole[start:stop].removeprefix(" "),
            )


def test_the_token_is_among_the_likeliest_and_the_first_has_none(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    a, b, c = ids_of(tiny_tokenizer, "abc")
    told = Logprobs(tiny_tokenizer).completion([Token(a), Token(b, -3.0, ((c, -0.1),)), Token(c, -0.1)], [0, 1, 2])
    assert told.token_logprobs == [None, -3.0, -0.1]
    assert told.top_logprobs == [None, {"c": -0.1, "b": -3.0}, {"c": -0.1}]
    assert told.text_offset == [0, 1, 2]


def test_what_never_comes_has_a_number_that_json_can_say(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    never = Token(5, -float("inf"), ((6, -float("inf")),))
    told = Logprobs(tiny_tokenizer).chat(never)
    assert told.logprob == told.top_logprobs[0].logprob == LEAST
    assert Logprobs(tiny_tokenizer).completion([never], [0]).token_logprobs == [LEAST]


def test_an_id_that_the_tokenizer_lacks_has_no_text(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    told = Logprobs(tiny_tokenizer).chat(Token(len(tiny_tokenizer) + 1, -1.0))
    assert (told.token, told.bytes) == ("", [])
