"""Plain text for the terminal: columns, sizes, JSON, and text without control characters.

No rich here: the output of verbs that list things must come at once, and be easy to cut and search.
"""

import os
import re
import sys
from collections.abc import Container, Iterator, Mapping, Sequence
from itertools import compress, zip_longest

# Control characters but tab and line feed: names, configurations and answers are untrusted, and terminals obey them.
GAP = "  "  # between columns
LABELS, LABEL = 20, 40  # labels that are shown, and characters of each
LEAST = 10  # columns of a text that is broken into lines
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """Return a text with its control characters replaced, so that it cannot move the cursor, ring or change colours."""
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def terminal_width() -> int | None:
    """Return the columns of the terminal, from $COLUMNS if it is set; None for a file or a pipe, without limit."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns) > 0:
        return int(columns)
    return os.get_terminal_size(sys.stdout.fileno()).columns or None if sys.stdout.isatty() else None


def columns(rows: Sequence[Sequence[str]], right: Container[int] = ()) -> str:
    """Return rows as aligned lines; `right` are the numbers, from 0, of the columns to align on the right.

    A table that is wider than the terminal becomes several, each with the first column and some of the others. Only
    text is broken into lines, never a column on the right.
    """
    limit = terminal_width()
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if limit and sum(widths) + len(GAP) * (len(widths) - 1) > limit:
        widths[0] = widths[0] if 0 in right else min(widths[0], max(LEAST, 2 * limit // 3))
        room = max(LEAST, limit - widths[0] - len(GAP))
        widths[1:] = [width if index in right else min(width, room) for index, width in enumerate(widths[1:], start=1)]
    parts = [part for block in _blocks(widths, limit) for part in ("", *_lines(rows, widths, block, right))]
    return printable("\n".join(parts[1:]))


def fitting(rows: Sequence[Sequence[str]], dropped: Sequence[str]) -> list[Sequence[str]]:
    """Return rows without the columns, of those `dropped` and in its order, for which the terminal is too narrow.

    The first row has the names of the columns.
    """
    limit = terminal_width()
    widths = {column[0]: max(map(len, column)) for column in zip(*rows, strict=True)}
    for head in dropped:
        if not limit or sum(widths.values()) + len(GAP) * (len(widths) - 1) <= limit:
            break
        widths.pop(head, None)
    selectors = [head in widths for head in rows[0]]
    return [[*compress(row, selectors)] for row in rows]


def _blocks(widths: Sequence[int], limit: int | None) -> Iterator[list[int]]:
    """Yield the columns of each table, the first in all of them, as many as fit into `limit`."""
    block, used = [0], widths[0] if widths else 0
    for index, width in enumerate(widths[1:], start=1):
        if limit and len(block) > 1 and used + len(GAP) + width > limit:
            yield block
            block, used = [0], widths[0]
        block.append(index)
        used += len(GAP) + width
    yield block if widths else []


def _lines(
    rows: Sequence[Sequence[str]], widths: Sequence[int], block: Sequence[int], right: Container[int]
) -> Iterator[str]:
    import textwrap

    for row in rows:
        cells = [
            [row[index]] if len(row[index]) <= widths[index] else textwrap.wrap(row[index], widths[index])
            for index in block
        ]
        for line in zip_longest(*cells, fillvalue=""):
            aligned = (
                cell.rjust(widths[index]) if index in right else cell.ljust(widths[index])
                for index, cell in zip(block, line, strict=True)
            )
            yield GAP.join(aligned).rstrip()


def format_list(values: Sequence[object], most: int) -> str:
    """Return the first `most` values, and how many more there are."""
    rest = len(values) - most
    return ", ".join(map(str, values[:most])) + (f" +{rest}" if rest > 0 else "")


def format_value(value: object) -> str:
    """Return the text of a setting's value."""
    if value is None:
        return "not set"
    if isinstance(value, dict):
        return format_list([f"{key}: {item}" for key, item in value.items()], 4)
    return format_list(value, 8) if isinstance(value, tuple) else f"{value}"


def format_size(nbytes: int) -> str:
    """Return a number of bytes with three digits, in powers of 1000."""
    value = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def print_json(value: object) -> None:
    """Write a value to stdout as indented JSON."""
    import json

    import msgspec

    text = msgspec.json.format(msgspec.json.encode(value), indent=2).decode()
    if not text.isascii() and not (sys.stdout.encoding or "").lower().startswith("utf"):
        text = json.dumps(json.loads(text), indent=2)  # with escapes for what the terminal has no letters for
    sys.stdout.write(f"{text}\n")


def label_counts(counts: Mapping[str, int]) -> str:
    """Return labels with their numbers and shares, the most frequent first: pos 60 (75.0%), neg 20 (25.0%)."""
    total = sum(counts.values())
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    shown = [f"{printable(name)[:LABEL]} {count:,} ({count / total:.1%})" for name, count in ordered[:LABELS]]
    return ", ".join(shown) + (f", and {len(counts) - LABELS:,} more" if len(counts) > LABELS else "")
