"""Word wrap of a text that arrives in pieces."""

import re

from rich.cells import cell_len

WIDE = "\u2e80-\u9fff\uac00-\ud7af\uff00-\uffef"  # Chinese, Japanese and Korean, which break between letters
PART = re.compile(rf"\n|[^\S\n]*(?:[{WIDE}]|[^\s{WIDE}]+)|[^\S\n]+")


class WordWrap:
    """Breaks lines between words, within `width` columns; None breaks nothing."""

    def __init__(self, width: int | None) -> None:
        self.width = width
        self._column = 0
        self._held = ""  # the last word, which may go on

    def push(self, piece: str) -> str:
        """Return the words that `piece` completes."""
        if self.width is None:
            return piece
        parts = PART.findall(self._held + piece)
        self._held = parts.pop() if parts and parts[-1] != "\n" else ""
        return "".join(map(self._place, parts))

    def rest(self) -> str:
        """Return the last word."""
        held, self._held = self._held, ""
        return self._place(held)

    def _place(self, part: str) -> str:
        if part == "\n":
            self._column = 0
            return part
        if self.width is not None and self._column and self._column + cell_len(part) > self.width:
            part = part.lstrip()
            self._column = cell_len(part)
            return f"\n{part}" if part else ""
        self._column += cell_len(part)
        return part
