from itertools import pairwise

import pytest

from loradeck.cli.display.chart import chart
from loradeck.cli.display.curves import Curve, Point


def curve(label: str, points: list[Point], marks: list[Point] | None = None, best: Point | None = None) -> Curve:
    return Curve(label, points, points, marks or [], best)


def plane(text: str) -> list[str]:
    """Return what lies to the right of the axis."""
    return [line[line.index(axis) + 1 :] for line in text.splitlines() for axis in "│┤" if axis in line]


FALL = curve("poet", [(1, 3.0), (101, 1.0)])


def test_a_falling_line_falls_from_corner_to_corner() -> None:
    text = chart([FALL], 30, 11, colour=True).plain
    rows = plane(text)
    filled = [[at for at, char in enumerate(row) if char != " "] for row in rows]
    assert len(rows) == 11
    assert (filled[0][0], filled[-1][-1]) == (0, 26)
    assert all(a[0] <= b[0] and b[0] <= a[-1] + 1 for a, b in pairwise(filled))  # no gap
    assert all("\u2800" < char <= "\u28ff" for row in rows for char in row if char != " ")


def test_the_axes_have_numbers() -> None:
    lines = chart([FALL], 30, 11, colour=True).plain.splitlines()
    assert [line.split("┤")[0].strip() for line in lines if "┤" in line] == ["3", "2", "1"]
    assert lines[12].split() == ["1", "101", "steps"]
    assert lines[13] == "━━ poet  3 -> 1"


@pytest.mark.parametrize("width", [30, 77, 200])
def test_its_width_is_as_requested(width: int) -> None:
    lines = chart([FALL], width, 16, colour=True).plain.splitlines()
    assert max(map(len, lines)) == width
    assert len(plane("\n".join(lines))) == 16


def test_evaluations_are_marked_and_the_best_with_a_star() -> None:
    marked = curve("poet", [(0, 2.0), (10, 2.0)], [(5, 3.0), (10, 1.0)], (10, 1.0))
    text = chart([marked], 40, 6, colour=True).plain
    rows = plane(text)
    assert rows[0].strip() == "●"
    assert rows[-1].rstrip().endswith("★")
    assert "★ validation 1 at step 10" in text


def test_without_colour_letters_tell_curves_apart() -> None:
    two = [curve("poet", [(0, 1.0), (9, 1.0)]), curve("judge", [(0, 2.0), (9, 2.0)])]
    text = chart(two, 30, 6, colour=False).plain
    rows = plane(text)
    assert set(rows[0]) == {"b"}
    assert set(rows[-1]) == {"a"}
    assert "a poet" in text
    assert "b judge" in text
    coloured = chart(two, 30, 6, colour=True)
    assert {span.style for span in coloured.spans if "judge" not in str(span)} >= {"cyan", "magenta"}


@pytest.mark.parametrize("points", [[(7, 2.0)], [(1, 0.0), (2, 0.0)], [(1, -5.0), (9, -5.0)]])
def test_a_curve_without_a_range_is_drawn(points: list[Point]) -> None:
    rows = plane(chart([curve("poet", points)], 30, 6, colour=True).plain)
    assert sum(bool(row.strip()) for row in rows) == 1
