"""Text up to a stop string, however the tokens cut both."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from loradeck.serve.stop_strings import StopFilter


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def pieces_of(stream: StopFilter, ids: list[int]) -> list[str]:
    pieces = []
    for token in ids:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    return [*pieces, stream.flush()]


def test_what_may_begin_a_stop_string_is_held(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    stream = StopFilter(tiny_tokenizer, ["END", "\n\n"])
    ids = ids_of(tiny_tokenizer, "aE\nb\n\nc")
    assert pieces_of(stream, ids) == ["a", "", "E", "\nb", "", "", ""]
    assert stream.stopped


def test_what_was_held_comes_at_the_end(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    stream = StopFilter(tiny_tokenizer, ["END"])
    assert pieces_of(stream, ids_of(tiny_tokenizer, "aEN")) == ["a", "", "", "EN"]
    assert not stream.stopped
    assert stream.flush() == ""


def test_a_stop_string_of_wide_characters(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = ids_of(tiny_tokenizer, "日本語だ")
    assert "".join(pieces_of(StopFilter(tiny_tokenizer, ["語"]), ids)) == "日本"
    assert "".join(pieces_of(StopFilter(tiny_tokenizer), ids[:-1])) == "日本語"


def test_special_tokens_are_no_text(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    end = tiny_tokenizer.eos_token_id
    assert "".join(pieces_of(StopFilter(tiny_tokenizer, ["<|im_end|>"]), [*ids_of(tiny_tokenizer, "a"), end])) == "a"


START, END = "<|im_start|>", "<|im_end|>"


def ids_with_specials(tokenizer: PreTrainedTokenizerFast, *parts: str) -> list[int]:
    return [
        token
        for part in parts
        for token in ([tokenizer.convert_tokens_to_ids(part)] if part in (START, END) else ids_of(tokenizer, part))
    ]


@pytest.mark.parametrize(
    ("stop", "parts", "text"),
    [
        (START, ["ab", START, "c"], "ab"),
        (f"\n{START}user", ["ab\n", START, "user", "c"], "ab"),
        (f"\n{START}user", ["ab\n", START, "uses"], None),
        (f"b{START}", ["abb", START, "c"], "ab"),
        (f"{START}b", ["a", START, "c", START, "b"], "ac"),
        (START + END, ["a", START, "b", START, END], "ab"),
        (START, ["ab", END, "c"], None),
        ("bc", ["ab", START, "cd"], "a"),  # as the client reads it
        (START, list("a" + START + "b"), "a"),  # spelt out
    ],
)
def test_a_stop_string_may_name_special_tokens(
    tiny_tokenizer: PreTrainedTokenizerFast, stop: str, parts: list[str], text: str | None
) -> None:
    ids = ids_with_specials(tiny_tokenizer, *parts)
    stream = StopFilter(tiny_tokenizer, ["\0no", stop])
    pieces = pieces_of(stream, ids)
    assert stream.stopped == (text is not None)
    everything = "".join(part for part in parts if part not in (START, END))
    assert "".join(pieces) == (everything if text is None else text)


def test_a_special_token_does_not_stop_within_the_first_tokens(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = ids_with_specials(tiny_tokenizer, "a", START, "b", START, "c")
    stream = StopFilter(tiny_tokenizer, [START], min_tokens=2)
    assert "".join(pieces_of(stream, ids)) == "ab"
    assert stream.stopped


@given(
    parts=st.lists(st.sampled_from(["a", "b", START, END])),
    stops=st.lists(st.lists(st.sampled_from(["a", "b", START, END]), min_size=1, max_size=3).map("".join), max_size=3),
)
def test_the_text_ends_before_the_first_stop_string_of_text_and_special_tokens(
    tiny_tokenizer: PreTrainedTokenizerFast, parts: list[str], stops: list[str]
) -> None:
    stream = StopFilter(tiny_tokenizer, stops)
    kept = "".join(pieces_of(stream, ids_with_specials(tiny_tokenizer, *parts)))
    for count in range(1, len(parts) + 1):
        read = "".join(parts[:count])
        shown = read.replace(START, "").replace(END, "")
        named = [stop for stop in stops if "<" in stop]
        if any(stop in read for stop in named) or any(stop in shown for stop in stops):
            assert stream.stopped
            starts = [
                len(read[: read.find(stop)].replace(START, "").replace(END, "")) for stop in named if stop in read
            ]
            starts += [shown.find(stop) for stop in stops if stop in shown]
            assert kept == shown[: min(starts)]
            return
    assert not stream.stopped
    assert kept == "".join(parts).replace(START, "").replace(END, "")


def test_a_text_that_goes_on_keeps_its_space(spaced_tokenizer: PreTrainedTokenizerFast) -> None:
    before, word = ids_of(spaced_tokenizer, "a"), ids_of(spaced_tokenizer, "b")
    assert StopFilter(spaced_tokenizer).push(word[0]) == "b"
    assert StopFilter(spaced_tokenizer, context=before).push(word[0]) == " b"
    assert StopFilter(spaced_tokenizer, [" b"], before).push(word[0]) == ""


def test_no_stop_string_ends_within_the_first_tokens(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    stream = StopFilter(tiny_tokenizer, ["ab", "b"], min_tokens=4)
    assert pieces_of(stream, ids_of(tiny_tokenizer, "abaabc")) == ["", "ab", "", "a", "", ""]
    assert stream.stopped


@pytest.mark.slow
def test_a_very_long_stop_string_costs_no_time(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    text = "a" * 2000
    stream = StopFilter(tiny_tokenizer, ["a" * 1_000_000, "aab" * 300_000])
    assert pieces_of(stream, ids_of(tiny_tokenizer, text)) == [""] * 2000 + [text]


@given(text=st.text("ab\n語"), stops=st.lists(st.text("ab\n語", min_size=1, max_size=3), max_size=4))
def test_the_text_is_what_comes_before_the_first_stop_string(
    tiny_tokenizer: PreTrainedTokenizerFast, text: str, stops: list[str]
) -> None:
    stream = StopFilter(tiny_tokenizer, stops)
    pieces = pieces_of(stream, ids_of(tiny_tokenizer, text))
    first = min((end for stop in stops if (end := _end(text, stop)) is not None), default=None)
    assert stream.stopped == (first is not None)
    kept = "".join(pieces)
    if first is None:
        assert kept == text
    else:
        assert any(kept + stop == text[: len(kept) + len(stop)] for stop in stops)
        assert not any(stop in kept for stop in stops)


def _end(text: str, stop: str) -> int | None:
    place = text.find(stop)
    return None if place < 0 else place + len(stop)
