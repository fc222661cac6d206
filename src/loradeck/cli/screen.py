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


def few(names: Sequence[str], most: int = 3) -> str:
    """Return the first names, and how many more there are."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" +{rest}" if rest > 0 else "")


def spelled(value: object) -> str:
    """Return a setting's value in words."""
    if value is None:
        return "not set"
    return few(value, 8) if isinstance(value, tuple) else f"{value}"


def size(nbytes: int) -> str:
    """Return a number of bytes with three digits, in powers of 1000."""
    value, unit = float(nbytes), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.5 or unit == "TB":
            break
        value /= 1000
    return f"{value:.3g} {unit}" if value < 999.5 else f"{value:.0f} {unit}"


def print_json(value: object) -> None:
    """Write a value to stdout as indented JSON, and nothing else."""
    import msgspec

    sys.stdout.write(msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n")
