"""A line chart for the terminal, drawn with braille dots.

A cell has 2 x 4 dots (Unicode block Braille Patterns). Without colours to tell curves apart, it shows a letter instead.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from string import ascii_letters

from rich.text import Text

from loradeck.cli.display.curves import Curve, Point

DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # row, column -> bit
COLOURS = ("cyan", "magenta", "yellow", "green", "red", "blue")
ROWS = 5  # from one label of the axis to the next
MARK, BEST = "●", "★"


def chart(curves: Sequence[Curve], width: int, height: int, *, colour: bool) -> Text:
    """Draw curves with axes and a legend in `width` columns; the plotting area has at most `height` rows."""
    height = max(ROWS + 1, height - (height - 1) % ROWS)  # so that the lowest row has a label
    (left, right), (low, high) = (_range([point[axis] for each in curves for point in each.points]) for axis in (0, 1))
    labels = {row: f"{high - (high - low) * row / (height - 1):.4g}" for row in range(0, height, ROWS)}
    margin = max(map(len, labels.values()))
    columns = max(2, width - margin - 2)

    def position(point: Point, across: int, down: int) -> tuple[int, int]:
        return (
            round((point[0] - left) / (right - left) * (across - 1)),
            round((high - point[1]) / (high - low) * (down - 1)),
        )

    cells: dict[tuple[int, int], tuple[int, int | str]] = {}
    """Row and column -> the curve drawn there last, and its dots or mark."""
    for number, each in enumerate(curves):
        for x, y in _joined([position(point, 2 * columns, 4 * height) for point in each.smooth]):
            owner, dots = cells.get((y // 4, x // 2), (number, 0))
            before = dots if owner == number and isinstance(dots, int) else 0
            cells[y // 4, x // 2] = number, before | DOTS[y % 4][x % 2]
    for number, each in enumerate(curves):
        for point in each.marks:
            column, row = position(point, columns, height)
            cells[row, column] = number, BEST if point == each.best else MARK

    letters = not colour and len(curves) > 1
    text = Text(no_wrap=True)
    for row in range(height):
        text.append(f"{labels.get(row, ''):>{margin}} {'┤' if row in labels else '│'}", style="dim")
        for column in range(columns):
            number, content = cells.get((row, column), (0, " "))
            if isinstance(content, int):
                content = _letter(number) if letters else chr(0x2800 + content)
            text.append(content, style=COLOURS[number % len(COLOURS)])
        text.append("\n")
    first, last = f"{left:.0f}", f"{right:.0f} steps"
    text.append(f"{'':>{margin}} └{'─' * columns}\n{'':>{margin + 2}}{first}{last:>{columns - len(first)}}\n", "dim")
    for number, each in enumerate(curves):
        text.append(f"{_letter(number) if letters else '━━'} ", style=COLOURS[number % len(COLOURS)])
        text.append(f"{_legend(each)}\n")
    return text


def _legend(curve: Curve) -> str:
    legend = curve.label
    if curve.smooth:
        legend += f"  {curve.smooth[0][1]:.4g} -> {curve.smooth[-1][1]:.4g}"
    if curve.best:
        legend += f"  {BEST} validation {curve.best[1]:.4g} at step {curve.best[0]}"
    return legend


def _letter(number: int) -> str:
    return ascii_letters[number % len(ascii_letters)]


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Return the least and the greatest value, moved apart if they are equal."""
    low, high = min(values), max(values)
    gap = 0 if high > low else abs(low) / 10 or 1
    return low - gap, high + gap


def _joined(dots: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield the dots, and those on the lines between them."""
    yield from dots[:1]
    for (x0, y0), (x1, y1) in pairwise(dots):
        steps = max(abs(x1 - x0), abs(y1 - y0))
        for at in range(1, steps + 1):
            yield x0 + round((x1 - x0) * at / steps), y0 + round((y1 - y0) * at / steps)
