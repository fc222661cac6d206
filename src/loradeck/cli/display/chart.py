"""Curves in a terminal, as dots of braille. Knows rich and numbers; knows no runs.

A cell holds 2 x 4 dots (Unicode, block Braille Patterns). Where there is no colour to tell curves apart, a cell holds
its curve's letter.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from string import ascii_letters

from rich.text import Text

from loradeck.cli.display.curves import Curve, Point

DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # row, column -> bit
COLOURS = ("cyan", "magenta", "yellow", "green", "red", "blue")
ROWS = 5  # between two numbers at the left
MARK, BEST = "●", "★"


def chart(curves: Sequence[Curve], width: int, height: int, *, colour: bool) -> Text:
    """Draw curves with axes and a legend in `width` columns; the plane itself has at most `height` rows."""
    height = max(ROWS + 1, height - (height - 1) % ROWS)  # so that the lowest row has its number
    (left, right), (low, high) = (_range([point[axis] for each in curves for point in each.points]) for axis in (0, 1))
    numbers = {row: f"{high - (high - low) * row / (height - 1):.4g}" for row in range(0, height, ROWS)}
    margin = max(map(len, numbers.values()))
    columns = max(2, width - margin - 2)

    def place(point: Point, across: int, down: int) -> tuple[int, int]:
        return (
            round((point[0] - left) / (right - left) * (across - 1)),
            round((high - point[1]) / (high - low) * (down - 1)),
        )

    cells: dict[tuple[int, int], tuple[int, int | str]] = {}
    """Row and column -> the curve that was drawn there last, and its dots or its mark."""
    for number, each in enumerate(curves):
        for x, y in _joined([place(point, 2 * columns, 4 * height) for point in each.smooth]):
            owner, dots = cells.get((y // 4, x // 2), (number, 0))
            before = dots if owner == number and isinstance(dots, int) else 0
            cells[y // 4, x // 2] = number, before | DOTS[y % 4][x % 2]
    for number, each in enumerate(curves):
        for point in each.marks:
            column, row = place(point, columns, height)
            cells[row, column] = number, BEST if point == each.best else MARK

    letters = not colour and len(curves) > 1
    text = Text(no_wrap=True)
    for row in range(height):
        text.append(f"{numbers.get(row, ''):>{margin}} {'┤' if row in numbers else '│'}", style="dim")
        for column in range(columns):
            number, what = cells.get((row, column), (0, " "))
            if isinstance(what, int):
                what = _letter(number) if letters else chr(0x2800 + what)
            text.append(what, style=COLOURS[number % len(COLOURS)])
        text.append("\n")
    first, last = f"{left:.0f}", f"{right:.0f} steps"
    text.append(f"{'':>{margin}} └{'─' * columns}\n{'':>{margin + 2}}{first}{last:>{columns - len(first)}}\n", "dim")
    for number, each in enumerate(curves):
        text.append(f"{_letter(number) if letters else '━━'} ", style=COLOURS[number % len(COLOURS)])
        text.append(f"{_legend(each)}\n")
    return text


def _legend(curve: Curve) -> str:
    said = curve.label
    if curve.smooth:
        said += f"  {curve.smooth[0][1]:.4g} -> {curve.smooth[-1][1]:.4g}"
    if curve.best:
        said += f"  {BEST} validation {curve.best[1]:.4g} at step {curve.best[0]}"
    return said


def _letter(number: int) -> str:
    return ascii_letters[number % len(ascii_letters)]


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Return the least and the greatest, a little apart where they are one."""
    low, high = min(values), max(values)
    gap = 0 if high > low else abs(low) / 10 or 1
    return low - gap, high + gap


def _joined(dots: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield dots and what lies straight between each two."""
    yield from dots[:1]
    for (x0, y0), (x1, y1) in pairwise(dots):
        steps = max(abs(x1 - x0), abs(y1 - y0))
        for at in range(1, steps + 1):
            yield x0 + round((x1 - x0) * at / steps), y0 + round((y1 - y0) * at / steps)
