"""How things look in a terminal: columns, sizes, JSON. Knows text; knows no adapters.

Plain print and no rich: what lists must answer at once, and be cut and searched by other programs.
"""

import re
import sys
from collections.abc import Container, Sequence

# All but tab and line feed; names, configurations and answers come from strangers, and a terminal obeys these.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def shown(text: str) -> str:
    """Return a text that cannot move the cursor, ring, or colour what follows it."""
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def columns(rows: Sequence[Sequence[str]], right: Container[int] = ()) -> str:
    """Return rows as aligned lines; the columns numbered in `right`, from 0, are flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(
            cell.rjust(width) if at in right else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return shown("\n".join(line.rstrip() for line in lines))


def few(values: Sequence[object], most: int) -> str:
    """Return the first values, and how many more there are."""
    rest = len(values) - most
    return ", ".join(map(str, values[:most])) + (f" +{rest}" if rest > 0 else "")


def spelled(value: object) -> str:
    """Return a setting's value in words."""
    if value is None:
        return "not set"
    if isinstance(value, dict):
        return few([f"{key}: {own}" for key, own in value.items()], 4)
    return few(value, 8) if isinstance(value, tuple) else f"{value}"


def size(nbytes: int) -> str:
    """Return a number of bytes with three digits, in powers of 1000."""
    value = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def print_json(value: object) -> None:
    """Write a value to stdout as indented JSON, and nothing else."""
    import msgspec

    sys.stdout.write(msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n")
