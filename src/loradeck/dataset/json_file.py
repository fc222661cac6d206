"""The records of a JSON file: objects one after the other, each on a line or over several, or the items of arrays."""

import re
from collections import deque
from collections.abc import Iterator
from io import BufferedReader

import msgspec

from loradeck.errors import DataError

RECORD_BYTES = 64 << 20
CHUNK = 1 << 18
DEPTH = 64  # of an object over several lines
STRING = rb'"(?:[^"\\]++|\\.)*+("|\\?\Z)'  # the first group is empty if the text ends within the string
TOKEN = re.compile(STRING + rb"|([{\[])|([}\]])", re.DOTALL)
BETWEEN = re.compile(rb"[\s,]*")
BLANK = re.compile(rb"\s*")
SCALAR = re.compile(STRING + rb'|[^\s,\[\]{}"]+', re.DOTALL)
ARRAY = re.compile(rb"\s*:\s*\[")
VALUE_FOLLOWS = (b",", b"[", b":")

NumberedRecords = Iterator[tuple[int, bytes | DataError]]


def read(file: BufferedReader, name: str) -> NumberedRecords:
    """Yield the records of a file of UTF-8 with the numbers of their first lines; `name` is the file's, for errors.

    The records are the items of an array, or of the array under `data`; otherwise they are objects. A line that is no
    complete object, nor the beginning of one, is a record too, for the reader of records to refuse.

    Raises:
        DataError: the file cannot be read from some line on.
    """
    start = _array_start(file.peek())
    return _lines(file) if start is None else _Items(file, name).read(start)


def too_long() -> DataError:
    """Return the problem of a record that is too long."""
    return DataError(f"$: has more than {RECORD_BYTES:,} bytes; split it into several records")


def _array_start(head: bytes) -> int | None:
    """Return where the items begin, if the file is an array, or an object with an array under `data`."""
    depth = 0
    for token in TOKEN.finditer(head):
        if depth == 0 and token[0] == b"[":
            return token.end()
        if depth == 1 and token[0] == b'"data"' and (array := ARRAY.match(head, token.end())):
            line, _, rest = head.lstrip().partition(b"\n")
            return None if rest.strip() and _is_json(line) else array.end()
        depth += (token[2] is not None) - (token[3] is not None)
        if depth == 0:
            return None
    return None


# ---- objects one after the other


def _lines(file: BufferedReader) -> NumberedRecords:
    number = 0
    waiting: deque[bytes] = deque()  # lines that were read in search of an object's end
    while line := waiting.popleft() if waiting else file.readline(RECORD_BYTES + 1):
        number += 1
        if len(line) > RECORD_BYTES:
            while line and not line.endswith(b"\n"):
                line = file.readline(RECORD_BYTES)
            yield number, too_long()
            continue
        if line.isspace():
            continue
        rest: list[bytes] = []
        if _is_json(line):
            yield number, line
        elif _continue(line, waiting, file, rest):
            yield number, b"".join([line, *rest])
            number += len(rest)
        else:
            waiting.extendleft(reversed(rest))
            yield from ((number, record) for record in _objects(line))


def _is_json(content: bytes) -> bool:
    try:
        msgspec.json.decode(content, type=msgspec.Raw)
    except (msgspec.DecodeError, RecursionError):
        return False
    return True


def _objects(line: bytes) -> list[bytes]:
    """Return the objects on a line, as in a file whose lines end with CR; the line itself if it holds anything else."""
    objects: list[bytes] = []
    depth = start = end = 0
    for token in TOKEN.finditer(line):
        if depth == 0:
            start = token.start()
            if token[0] != b"{" or not BETWEEN.fullmatch(line, end, start):
                return [line]
        depth += (token[2] is not None) - (token[3] is not None)
        if depth == 0:
            end = token.end()
            objects.append(line[start:end])
    return objects if objects and depth == 0 and BETWEEN.fullmatch(line, end) else [line]


def _continue(line: bytes, waiting: deque[bytes], file: BufferedReader, rest: list[bytes]) -> bool:
    """Add the lines to `rest` on which the object that begins with `line` goes on; return whether it ends there."""
    depth = _depth(line)
    last = line.rstrip()[-1:]
    size = len(line)
    if not line.lstrip().startswith(b"{"):
        return False
    while depth:
        line = waiting.popleft() if waiting else file.readline(RECORD_BYTES - size + 1)
        rest.append(line)
        size += len(line)
        change = _depth(line)
        if not line or size > RECORD_BYTES or change is None:
            return False
        if stripped := line.strip():
            first = stripped[:1]
            fits = first in b'"}' if last == b"{" else last in VALUE_FOLLOWS or first in b",]}:"
            if not fits:
                return False
            last = stripped[-1:]
        depth += change
        if not 0 <= depth <= DEPTH:
            return False
    return depth == 0 and bool(rest)


def _depth(line: bytes) -> int | None:
    """Return by how many brackets a line goes deeper; None if it ends within a string."""
    depth = 0
    for token in TOKEN.finditer(line):
        if token[1] is not None and not token[1].startswith(b'"'):
            return None
        depth += (token[2] is not None) - (token[3] is not None)
    return depth


# ---- the items of an array


class _Items:
    """Reads the items of arrays one after the other, in chunks; at least the current item is in memory."""

    def __init__(self, file: BufferedReader, name: str) -> None:
        self.file, self.name = file, name
        self.text = b""
        self.at = 0
        """Where the current item begins in `text`."""
        self.line = 1
        """The line of `at`."""

    def read(self, start: int) -> NumberedRecords:
        """Yield the items from byte `start` of the file on."""
        self._grow()
        in_object = self.text[:start].strip() != b"["
        self._skip_to(start)
        while True:
            self._skip_to(self._end(BETWEEN))
            first = self.text[self.at : self.at + 1]
            if first == b"]":
                self._skip_to(self.at + 1)
                if in_object:
                    self._skip_to(self._end_of_object(depth=1))
                self._skip_to(self._end(BLANK))
                if self.at == len(self.text):
                    return
                if in_object or self.text[self.at : self.at + 1] != b"[":
                    raise self._invalid("more follows after its end")
                self._skip_to(self.at + 1)
                continue
            end = self._end_of_object() if first in (b"{", b"[") else self._end(SCALAR)
            if end == self.at:
                what = "its array does not end" if first in (b"", b"{", b"[") else f"unexpected {first.decode()}"
                raise self._invalid(what)
            yield self.line, self.text[self.at : end]
            self._skip_to(end)

    def _invalid(self, what: str) -> DataError:
        message = f"{self.name} is not valid JSON: line {self.line}: {what}"
        return DataError(message, hint="Correct it, or copy it again.")

    def _skip_to(self, end: int) -> None:
        self.line += self.text.count(b"\n", self.at, end)
        self.at = end

    def _grow(self) -> bool:
        """Drop what is behind and read more, at least as much as there is: so a long item is not searched too often.

        Raises:
            DataError: the item is too long.
        """
        self.text = self.text[self.at :]
        self.at = 0
        if len(self.text) > RECORD_BYTES:
            raise DataError(f"{self.name}:{self.line}: {too_long().message}")
        chunk = self.file.read(max(CHUNK, len(self.text)))
        self.text += chunk
        return bool(chunk)

    def _end(self, pattern: re.Pattern[bytes]) -> int:
        """Return where that ends which matches here."""
        while True:
            match = pattern.match(self.text, self.at)
            length = match.end() - self.at if match else 0
            if self.at + length < len(self.text) or not self._grow():
                return self.at + length  # after _grow, `at` is another

    def _end_of_object(self, depth: int = 0) -> int:
        """Return where the object or array ends that begins here, or `depth` levels above; here if it does not end."""
        position = 0  # from here on
        while True:
            for token in TOKEN.finditer(self.text, self.at + position):
                if token[1] is not None and not token[1].startswith(b'"'):
                    position = token.start() - self.at
                    break
                depth += (token[2] is not None) - (token[3] is not None)
                if not depth:
                    return token.end()
            else:
                position = len(self.text) - self.at
            if not self._grow():
                return self.at
