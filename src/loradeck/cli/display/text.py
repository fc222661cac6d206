"""Plain text for the terminal: columns, sizes, JSON, and text without control characters.

No rich here: the output of verbs that list things must come at once, and be easy to cut and search.
"""

import re
import sys
from collections.abc import Container, Sequence

# Control characters but tab and line feed: names, configurations and answers are untrusted, and terminals obey them.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """Return a text with its control characters replaced, so that it cannot move the cursor, ring or change colours."""
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def columns(rows: Sequence[Sequence[str]], right: Container[int] = ()) -> str:
    """Return rows as aligned lines; `right` are the numbers, from 0, of the columns to align on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return printable("\n".join(line.rstrip() for line in lines))


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
    import msgspec

    sys.stdout.write(msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n")
