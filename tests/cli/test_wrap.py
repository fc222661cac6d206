from hypothesis import given
from hypothesis import strategies as st

from loradeck.cli.display.wrap import WordWrap


def wrapped(pieces: list[str], width: int | None) -> str:
    wrap = WordWrap(width)
    return "".join([*map(wrap.push, pieces), wrap.rest()])


def test_lines_break_between_words() -> None:
    text = "Arrr, the salt in the sea be from the wind, matey.\n\n  - one\nA supercalifragilistic word\n"
    assert wrapped([*text], 20) == (
        "Arrr, the salt in\nthe sea be from the\nwind, matey.\n\n  - one\nA\nsupercalifragilistic\nword\n"
    )
    assert wrapped(["漢字かな交じり文"], 8) == "漢字かな\n交じり文"
    assert wrapped([text], None) == text
    assert wrapped(["aaa bb", " a   ", "\n"], 3) == "aaa\nbb\na\n"


def test_a_word_is_shown_as_soon_as_the_next_one_begins() -> None:
    wrap = WordWrap(20)
    assert [wrap.push(piece) for piece in ("Ar", "rr, ", "the", " salt")] == ["", "Arrr,", "", " the"]
    assert wrap.rest() == " salt"


@given(st.lists(st.text("ab \n漢")), st.integers(1, 12))
def test_pieces_do_not_matter_and_no_word_is_lost(pieces: list[str], width: int) -> None:
    text = "".join(pieces)
    assert wrapped(pieces, width) == wrapped([text], width)
    assert wrapped(pieces, width).replace("\n", "").replace(" ", "") == text.replace("\n", "").replace(" ", "")
