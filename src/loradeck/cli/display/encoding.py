"""Output in whatever encoding the terminal has: no character is an error.

Drawings and typography become the nearest ASCII character, so tables and curves keep their shape. Any other character
becomes an escape as in JSON, from which it can be read back.
"""

import codecs
import io
import sys

HANDLER = "loradeck"
PLAIN = {
    **dict(zip("▁▂▃▄▅▆▇█", "_.:-=+*#", strict=True)),
    **dict.fromkeys("─━═", "-"),
    **dict.fromkeys("│┃║", "|"),
    **dict.fromkeys("–—−‐‑·", "-"),
    **dict.fromkeys("‘’", "'"),
    **dict.fromkeys("“”", '"'),
    "…": "~",
    "★": "*",
    "●": "o",
    "•": "*",
    "⏎": "$",  # as `cat -A` shows the end of a line
    "µ": "u",
    "→": ">",
    "×": "x",
    "\u00a0": " ",
    "\N{REPLACEMENT CHARACTER}": "?",
}


def accept_any_text() -> None:
    """Make standard output and error replace what they cannot encode; a terminal's input is UTF-8 if it is no more
    than ASCII.
    """
    codecs.register_error(HANDLER, _replace)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=HANDLER)
    if isinstance(sys.stdin, io.TextIOWrapper) and codecs.lookup(sys.stdin.encoding).name == "ascii":
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_plain, error.object[error.start : error.end])), error.end


def _plain(char: str) -> str:
    if char in PLAIN:
        return PLAIN[char]
    if "\u2500" <= char <= "\u257f":  # corners and crossings of tables
        return "+"
    if "\u2800" <= char <= "\u28ff":  # the dots of curves
        return "*" if char != "\u2800" else " "
    units = char.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at : at + 2].hex()}" for at in range(0, len(units), 2))
