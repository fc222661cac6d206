"""Columns that a dataset names otherwise: renaming them, and guessing which is which."""

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from loradeck.errors import DataError

SHOWN = 12  # columns named in an error
# The usual names of our columns, the most usual first; case, spaces and underscores do not count.
NAMES: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "question", "instruction", "query", "problem", "input", "user", "request", "q"),
    "completion": ("completion", "answer", "response", "output", "solution", "reply", "assistant", "target", "a"),
    "instruction": ("instruction",),
    "input": ("input", "context"),
    "output": ("output", "response", "answer", "completion"),
    "system": ("system", "systemprompt", "systemmessage"),
    "chosen": ("chosen", "preferred"),
    "rejected": ("rejected", "dispreferred"),
    "messages": ("messages", "dialog", "dialogue", "chat"),
    "conversations": ("conversations", "conversation"),
    "text": ("text",),
}
# The columns of each form, in the order in which a record is tried against them.
FORMS = (
    ("chosen", "rejected", "prompt"),
    ("messages",),
    ("conversations",),
    ("instruction", "input", "output"),
    ("prompt", "completion"),
    ("text",),
)


def rename(keys: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Return a record under our names; `columns` maps them to the dataset's."""
    if not columns:
        return dict(keys)
    others = {key: value for key, value in keys.items() if key not in columns and key not in columns.values()}
    return others | {ours: keys[theirs] for ours, theirs in columns.items() if theirs in keys}


def replaced_keys(keys: Mapping[str, Any], columns: Mapping[str, str]) -> list[str]:
    """Return the dataset's own columns of our names that `columns` replaces."""
    return [key for key in columns if key in keys and key not in columns.values()]


def in_source_names(error: DataError, columns: Mapping[str, str]) -> DataError:
    """Return an error about a path, as in `$.prompt: …`, under the dataset's name of the column."""
    path = re.match(r"\$\.(\w+)", error.message)
    if path is None or path[1] not in columns:
        return error
    return DataError(f"$.{columns[path[1]]}{error.message[path.end() :]}", hint=error.hint)


def guess(keys: Sequence[str]) -> dict[str, str]:
    """Return which columns are ours under other names, by their usual names; empty if no form can be made of them."""
    plain = {re.sub(r"[\W_]", "", key).lower(): key for key in reversed(keys)}
    for form in FORMS:
        columns: dict[str, str] = {}
        for ours in (*form, "system"):
            names = (plain[name] for name in NAMES[ours] if name in plain)
            if theirs := next((name for name in names if name not in columns.values()), None):
                columns[ours] = theirs
        if columns.keys() >= set(form):
            return {ours: theirs for ours, theirs in columns.items() if ours != theirs}
    return {}


def unknown_form(
    what: str, keys: Mapping[str, Any], columns: Mapping[str, str], needed: Sequence[str] = ()
) -> DataError:
    """Return the error of a record of none of the forms, with the setting that may help.

    It names the columns that are `needed`; without any it guesses.
    """
    names = [key for key, value in keys.items() if value is not None]
    shown = ", ".join(f"{name!r:.24}" for name in names[:SHOWN]) + ", …" * (len(names) > SHOWN)
    if absent := [theirs for theirs in columns.values() if theirs not in names]:
        return DataError(f"$: has no {absent[0]!r:.24}, which columns names; the keys are {shown or 'none'}")
    error = DataError(f"{what}, but the keys are {shown or 'none'}")
    if needed:
        return naming(error, {ours: ours if ours in names else "COLUMN" for ours in needed})
    return with_suggestion(error, names)


def with_suggestion(
    error: DataError, names: Sequence[str], needed: Sequence[str] = ("prompt", "completion")
) -> DataError:
    """Return an error about missing columns with the setting that names them, as far as they can be guessed."""
    return naming(error, guess(names) or dict.fromkeys(needed, "COLUMN"))


def naming(error: DataError, mapping: Mapping[str, str]) -> DataError:
    """Return an error with the setting that names columns, in the words of each door."""
    cli = f"{as_flag(mapping)}, or in a run file columns = {_quoted(as_text(mapping))}"
    http = f'"lora": {{"columns": {_quoted(as_text(mapping))}}}'
    return DataError(error.message, hint="Name the columns:", python=as_python(mapping), cli=cli, http=http)


def as_python(columns: Mapping[str, str]) -> str:
    """Return columns as an argument of read_dataset."""
    pairs = ", ".join(f'"{ours}": {_quoted(theirs)}' for ours, theirs in columns.items())
    return f"DataConfig(columns={{{pairs}}})"


def as_flag(columns: Mapping[str, str]) -> str:
    """Return columns as a flag."""
    return "--columns " + shlex.quote(as_text(columns))


def as_text(columns: Mapping[str, str]) -> str:
    """Return columns as the text that DataConfig reads."""
    return ",".join(f"{ours}={theirs}" for ours, theirs in columns.items())


def _quoted(text: str) -> str:
    return msgspec.json.encode(text).decode()
