"""A file of JSON lines, read whole or refused whole. Knows files and line numbers; knows no JSON and no tokens."""

from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from loradeck.errors import DataError
from loradeck.train.example import Example
from loradeck.train.record import EXPECTED, parse

LINE_BYTES = 4 << 20
FILE_BYTES = 256 << 20  # its tokens are held in memory, at about ten times this size
MEND = f"Each line is one JSON object with {EXPECTED}."


def read_dataset(path: Path | str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Example]:
    """Read every line of a JSONL file; blank lines are passed over.

    Raises:
        DataError: the file cannot be read or is empty, or lines are bad: each is a problem, `file:line: path: what`.
    """
    path = Path(path)
    examples: list[Example] = []
    problems: list[str] = []
    for number, line in _lines(path):
        try:
            examples.append(Example.of(parse(line), tokenizer, max_length))
        except DataError as error:
            problems.append(f"{path.name}:{number}: {error.message}")
    if problems:
        raise DataError(f"{path} has {len(problems)} lines that cannot be trained on", problems, mend=MEND)
    if not examples:
        raise DataError(f"{path} is empty", mend=MEND)
    return examples


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that are not blank, with their numbers from 1."""
    try:
        size = path.stat().st_size
        if size > FILE_BYTES:
            raise DataError(f"{path} has {size:,} bytes, more than {FILE_BYTES:,}", mend="Train on a part of it.")
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(LINE_BYTES + 1), b""), start=1):
                if len(line) > LINE_BYTES:
                    raise DataError(f"{path}:{number}: has more than {LINE_BYTES:,} bytes", mend=MEND)
                if line.strip():
                    yield number, line
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", mend="Give a JSONL file.") from error
