"""The text of a blend: what it may be, and that writing and reading it are inverse."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loradeck.blend import format_blend, parse_blend
from loradeck.errors import ConfigError

NAMES = st.text(st.characters(exclude_characters="*+", exclude_categories=["Cs"]), min_size=1).filter(
    lambda name: name == name.strip()
)
WEIGHTS = st.floats(allow_nan=False, allow_infinity=False)


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("poet", [("poet", 1.0)]),
        ("poet*0.7+pirate*0.3", [("poet", 0.7), ("pirate", 0.3)]),
        ("poet*-1 + pirate", [("poet", -1.0), ("pirate", 1.0)]),
        ("poet*0.5+poet*0.25", [("poet", 0.5), ("poet", 0.25)]),
    ],
)
def test_parse(text: str, weights: list[tuple[str, float]]) -> None:
    assert parse_blend(text) == weights


@pytest.mark.parametrize(
    "text", ["", "+", "poet*", "*0.5", "poet*half", "poet+", "poet*0.5*", "poet*nan", "poet*1e999"]
)
def test_an_invalid_blend_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="invalid blend"):
        parse_blend(text)


def test_format() -> None:
    assert format_blend([]) == ""
    assert format_blend([("poet@2", 1.0), ("pirate", -0.5), ("bard", 2)]) == "poet@2+pirate*-0.5+bard*2"


@given(st.lists(st.tuples(NAMES, WEIGHTS), min_size=1))
def test_parse_reads_what_format_writes(weights: list[tuple[str, float]]) -> None:
    assert parse_blend(format_blend(weights)) == weights
