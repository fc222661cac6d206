"""How the records of a dataset are read."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from loradeck.dataset.label import FORMS
from loradeck.errors import ConfigError

KEYS = sorted({key for forms in FORMS.values() for form, _ in forms.table for key in form.__struct_encode_fields__})
EXAMPLE = {
    "python": 'Give columns={"prompt": "question", "completion": "answer"}.',
    "cli": "Give --columns prompt=question,completion=answer, or a table columns in a run file.",
}


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The settings of reading a dataset.

    Raises:
        ConfigError: columns that are no mapping, or an unknown encoding.
    """

    columns: str | Mapping[str, str] | None = field(default=None, hash=False)
    """Columns that the dataset names otherwise: prompt=question,completion=answer."""
    encoding: str | None = None
    """Encoding of text files, such as cp1252; left out, it is found."""
    skip_long: bool = False
    """Leave out records longer than max_length, and count them."""
    fold_system: bool = False
    """Put a system message into the next user message, if the chat template allows no system message."""

    def __post_init__(self) -> None:
        for name in ("skip_long", "fold_system"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, not {getattr(self, name)!r:.40}")
        object.__setattr__(self, "columns", _mapping(self.columns) or None)
        try:
            b"ab".decode(self.encoding or "utf-8", "ignore")  # refuses codecs for other things than text, as base64
        except (LookupError, TypeError, ValueError) as error:
            raise ConfigError(
                f"unknown encoding {self.encoding!r:.40}", hint="Some are utf-8, utf-16, cp1252 and latin-1."
            ) from error

    @property
    def source_columns(self) -> dict[str, str]:
        """The dataset's name of each of our columns that it names otherwise."""
        return dict(self.columns) if isinstance(self.columns, Mapping) else {}


def _mapping(columns: object) -> dict[str, str]:
    """Return columns as a mapping; a string lists `ours=theirs`, separated by commas."""
    if isinstance(columns, str):
        # A comma may also be part of a name: only one before the next `ours=` separates.
        pairs = [part.split("=", 1) for part in re.split(r",(?=\s*\w+\s*=)", columns) if part.strip()]
        if any(len(pair) != 2 for pair in pairs) or len({pair[0].strip() for pair in pairs}) < len(pairs):
            raise ConfigError(f"columns {columns!r:.80} is not a list of ours=theirs, each once", **EXAMPLE)
        columns = {ours.strip(): theirs.strip() for ours, theirs in pairs}
    if columns is None:
        return {}
    if not isinstance(columns, Mapping) or not all(isinstance(n, str) and n for pair in columns.items() for n in pair):
        raise ConfigError(f"columns must map our names to the dataset's, not {columns!r:.80}", **EXAMPLE)
    for ours, theirs in columns.items():
        if ours not in KEYS:
            hint = f"Write {theirs}={ours}." if theirs in KEYS else f"There are {', '.join(KEYS)}."
            raise ConfigError(f"columns: {ours!r:.40} is no key of a record", hint=hint)
    return dict(columns)
