"""Tables of text (CSV): rows of cells between commas, semicolons, tabs or bars, the first row naming the columns."""

import csv
import io
import re
from collections.abc import Iterator
from io import BufferedReader
from typing import Any

from loradeck.dataset.json_file import RECORD_BYTES
from loradeck.errors import DataError

SUFFIXES = (".csv", ".tsv")
DELIMITERS = (",", ";", "\t", "|")
JSON = re.compile(r'\s*[\[{]\s*["\[{]')
SEPARATOR = re.compile(r"sep=([^\w\s\"]|\t)\r?\n")  # the first line of some files for Excel


def read(file: BufferedReader, name: str) -> Iterator[tuple[int, dict[str, Any] | DataError]]:
    """Yield the rows of a file of UTF-8 with their numbers: the header is row 1, as in a spreadsheet.

    The delimiter is the one that gives the header the most columns; `name` is the file's, for errors.

    Raises:
        DataError: it is not such a table.
    """
    csv.field_size_limit(RECORD_BYTES)
    head = file.peek().decode(errors="ignore")
    if JSON.match(head):
        raise DataError(f"{name} is JSON, not a table", hint="Rename it to end with .jsonl.")
    named = SEPARATOR.match(head)
    delimiter = named[1] if named else max(DELIMITERS, key=lambda each: _columns(head, each))
    with io.TextIOWrapper(file, encoding="utf-8", newline="") as text:
        rows = csv.reader(text, delimiter=delimiter, strict=True)
        number = 0
        columns: list[str] = []
        while True:
            number += 1
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield number, DataError(f"$: the file cannot be read from here on: {error}; double quotes in a cell")
                return
            if named and number == 1:
                continue
            if not columns:
                columns = [column.strip() for column in row]
                names = [*filter(None, columns)]  # a spreadsheet's empty columns have no names
                if len(set(names)) != len(names):
                    raise DataError(f"{name} has two columns of one name", hint="Rename or remove one.")
            elif row:
                yield number, _record(columns, row)


def _columns(head: str, delimiter: str) -> int:
    try:
        return len(next(csv.reader(io.StringIO(head, newline=""), delimiter=delimiter), ()))
    except csv.Error:
        return 0


def _record(columns: list[str], row: list[str]) -> dict[str, Any] | DataError:
    if len(row) != len(columns):
        return DataError(f"$: has {len(row)} cells for {len(columns)} columns; quote cells that contain delimiters")
    return dict(zip(columns, row, strict=True))
