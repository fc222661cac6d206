import pytest
from hypothesis import given
from hypothesis import strategies as st

from loradeck.cli.display.text import columns, format_list, format_size, format_value, printable


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (9_768_960, "9.77 MB"), (999_600, "1 MB"), (2 * 10**12, "2 TB")],
)
def test_sizes_have_three_digits(nbytes: int, text: str) -> None:
    assert format_size(nbytes) == text


def test_columns_are_aligned() -> None:
    assert columns([("name", "r"), ("poet", "16"), ("x", "8")], right=(1,)) == "name   r\npoet  16\nx      8"


def test_values_in_words() -> None:
    assert format_value(None) == "not set"
    assert format_value(("a", "b")) == "a, b"
    assert format_value((1, 2)) == "1, 2"
    assert format_value(dict.fromkeys("abcde", 4)) == "a: 4, b: 4, c: 4, d: 4 +1"
    assert format_list([*"abcd"], 3) == "a, b, c +1"


@pytest.mark.slow
@given(st.text())
def test_nothing_shown_can_steer_a_terminal(text: str) -> None:
    assert all(char.isprintable() or char in "\t\n" or ord(char) > 0x9F for char in printable(text))
    assert printable(printable(text)) == printable(text)
