"""The prompts of a command line: arguments, a file, or standard input.

Text has a prompt on each line. JSON Lines have a record on each, with `prompt` or `messages`; a last answer of the
assistant is left out. Encodings that a file's first bytes show, such as UTF-16, are read, and compressed files.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Any, TypeAlias

import msgspec

from loradeck.cli.options import STDIN
from loradeck.dataset.text_file import as_utf8
from loradeck.errors import ConfigError, DataError

Message: TypeAlias = dict[str, Any]
Prompt: TypeAlias = str | list[Message]
RECORDS = {".jsonl", ".ndjson"}
HINT = 'A prompt is a line of text or, in a .jsonl file, {"prompt": "…"} or {"messages": [{"role": …, "content": …}]}.'


class _Record(msgspec.Struct):
    prompt: Prompt | None = None
    messages: list[Message] | None = None


def read_prompts(arguments: Sequence[str], file: str | None = None) -> list[Prompt]:
    """Return the prompts of the arguments and of a file; without either, those of standard input, if it is piped.

    Raises:
        ConfigError: there is no prompt.
        DataError: a file cannot be read, or one of its lines is no prompt.
    """
    if not arguments and file is None and not sys.stdin.isatty():
        file = STDIN
    prompts: list[Prompt] = []
    for text in arguments:
        prompts += _of_file(text) if text == STDIN else [text]
    if file is not None:
        prompts += _of_file(file)
    if not prompts:
        raise ConfigError(
            "there is no prompt", hint="Give one or more, --prompts FILE, or `-` to read them from standard input."
        )
    return prompts


def with_system(prompt: Prompt, system: str | None) -> Prompt:
    """Return a prompt with a system prompt before it, unless it has its own."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if system is None or (messages and messages[0].get("role") == "system"):
        return prompt
    return [{"role": "system", "content": system}, *messages]


def title(prompt: Prompt) -> str:
    """Return the text of a prompt by which its answer is found: of messages, the last one's."""
    return prompt if isinstance(prompt, str) else str(prompt[-1].get("content", ""))


def _of_file(file: str) -> Iterator[Prompt]:
    name = "standard input" if file == STDIN else file
    try:
        with _open(file) as source, as_utf8(name, source) as content:
            text = content.read().decode()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}", hint="Give a file of prompts.") from error
    except DataError as error:
        raise DataError(error.message, hint="Save it as UTF-8, uncompressed.") from error
    # Not `splitlines`: a line separator of Unicode, as in copied text, ends neither a line nor a JSON record.
    lines = [(number, line.strip()) for number, line in enumerate(re.split("\r\n?|\n", text), 1) if line.strip()]
    if not lines and file != STDIN:
        raise DataError(f"{name} has no prompt", hint=HINT)
    are_records = bool(RECORDS.intersection(Path(file.lower()).suffixes)) or all(
        line.startswith('{"') for _, line in lines
    )
    for number, line in lines:
        yield _of_record(f"{name}:{number}", line) if are_records else line


def _open(file: str) -> AbstractContextManager[BufferedReader]:
    if file != STDIN:
        return Path(file).open("rb")
    buffer = getattr(sys.stdin, "buffer", None)  # its bytes are UTF-8, whatever the locale says of the terminal
    return nullcontext(buffer or BufferedReader(BytesIO(sys.stdin.read().encode())))


def _of_record(place: str, line: str) -> Prompt:
    try:
        record = msgspec.json.decode(line, type=_Record)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{place}: {error}", hint=HINT) from error
    prompt = record.prompt if record.messages is None else record.messages
    if isinstance(prompt, list) and len(prompt) > 1 and prompt[-1].get("role") == "assistant":
        prompt = prompt[:-1]
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise DataError(f"{place}: the record has no prompt", hint=HINT)
    return prompt
