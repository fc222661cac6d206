"""The errors that this library raises.

LoradeckError            all of them; has a message, the problems found and a hint
├── ConfigError          an invalid setting or argument (a rank of 0, an unknown flag)
├── TargetError          a target matches no module, or a module that cannot have an adapter
├── AdapterNameError     an adapter name that is invalid or already used
├── UnknownAdapterError  no loaded or stored adapter has this name
├── RouteError           a route does not fit its batch
├── AdapterError         an adapter's folder cannot be read or written, or does not fit the base
│   ├── UnsupportedError a feature that is not supported; refused rather than half loaded
│   └── StoreUnreachableError  a store elsewhere does not answer now
├── BaseModelError       a base cannot be found or loaded
├── DataError            an invalid dataset; names the file and the line
├── StorageError         a disk, or the database of a live server, cannot be read or written
├── UnknownFileError     no uploaded file has this id
├── FileTooLargeError    an upload is larger than the server or a key's quota allows
├── UnknownJobError      no job has this id
├── QuotaError           more jobs than a key's quota allows
├── TrainingError        a run cannot start, resume or go on
├── BusyError            the engine takes no request now: its queue is full, or it is shutting down
└── RequestError         one request failed; others went on
    ├── LogitsError           its logits are NaN or Inf, or leave no token to choose
    └── RequestTimeoutError   it was not done in time

Interruption             none of them, and no error: what is being done is to end now
"""

from collections.abc import Sequence
from typing import Literal, TypeAlias

Door: TypeAlias = Literal["python", "cli", "http"]  # where an error is shown
SHOWN = 12  # problems in the text of an error; `.problems` has them all


class LoradeckError(Exception):
    """Base class: what is wrong, every problem found, and how to fix it.

    `str(error)` is the message with its problems on one line, and the hint, if there is one, on the next, in Python's
    words; the command line and the server show the same error in theirs.

    Attributes:
        message: What is wrong, in one line.
        problems: Each problem found; empty if there is only one, which is then the message.
        hint: How to fix it, in words that suit Python, the command line and HTTP; empty if there is nothing to add.
        python: What to add to the hint in Python, such as an argument.
        cli: What to add to it on the command line, such as a flag.
        http: What to add to it over HTTP, such as a job's setting.
    """

    def __init__(
        self,
        message: str,
        problems: Sequence[str] = (),
        *,
        hint: str = "",
        python: str = "",
        cli: str = "",
        http: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.problems = tuple(problems)
        self.hint = hint
        self.python = python
        self.cli = cli
        self.http = http

    def __str__(self) -> str:
        return self.text("python")

    def text(self, door: Door) -> str:
        """Return the message with its problems on one line, and the hint in a door's words on the next."""
        return self._text(door, ": ", "; ")

    def report(self) -> str:
        """Return the text for a terminal: several problems each on their own line."""
        return self._text("cli", ":\n  ", "\n  ") if len(self.problems) > 1 else self.text("cli")

    def hint_for(self, door: Door) -> str:
        """Return the hint in a door's words."""
        words = {"python": self.python, "cli": self.cli, "http": self.http}[door]
        return f"{self.hint} {words}".strip()

    def _text(self, door: Door, first: str, between: str) -> str:
        rest = len(self.problems) - SHOWN
        parts = [*self.problems[:SHOWN], *([f"and {rest} more"] if rest > 0 else [])]
        text = self.message + (first + between.join(parts) if parts else "")
        hint = self.hint_for(door)
        return f"{text}\n{hint}" if hint else text


class ConfigError(LoradeckError):
    """An invalid setting or argument."""


class TargetError(LoradeckError):
    """A target matches no module, or a module that cannot have an adapter."""


class AdapterNameError(LoradeckError):
    """An adapter name that is invalid or already used."""


class UnknownAdapterError(LoradeckError):
    """No loaded or stored adapter has this name."""


class RouteError(LoradeckError):
    """A route does not fit its batch."""


class AdapterError(LoradeckError):
    """An adapter's folder cannot be read or written, or does not fit the base."""


class UnsupportedError(AdapterError):
    """A feature that is not supported; refused rather than half loaded."""


class StoreUnreachableError(AdapterError):
    """A store elsewhere does not answer now, or fails; the same call may succeed later."""


class BaseModelError(LoradeckError):
    """A base model cannot be found or loaded."""


class DataError(LoradeckError):
    """An invalid dataset; names the file and the line."""


class StorageError(LoradeckError):
    """A disk, or the database of a live server, cannot be read or written."""


class UnknownFileError(LoradeckError):
    """No uploaded file has this id."""


class FileTooLargeError(LoradeckError):
    """An upload is larger than the server or a key's quota allows."""


class UnknownJobError(LoradeckError):
    """No job has this id."""


class QuotaError(LoradeckError):
    """More jobs than a key's quota allows."""


class TrainingError(LoradeckError):
    """A run cannot start, resume or go on."""


class BusyError(LoradeckError):
    """The engine takes no request now. `retry_after` is the number of seconds to wait before the next attempt."""

    def __init__(self, message: str, *, retry_after: float, hint: str = "") -> None:
        super().__init__(message, hint=hint or f"Try again in {retry_after:.0f} s.")
        self.retry_after = retry_after


class RequestError(LoradeckError):
    """One request failed; others went on."""


class LogitsError(RequestError):
    """The logits of a request, or its vector, are NaN or Inf, or its bias rules all tokens out."""


class RequestTimeoutError(RequestError):
    """A request was not done in time."""


def shorten(value: object, length: int = 40) -> str:
    """Return a value from a stranger's file for an error message."""
    if isinstance(value, int) and abs(value) > 10**12:
        return "an integer beyond 10^12"  # printing it could itself take forever
    text = repr(value)
    return text if len(text) <= length else text[: length - 1] + "…"


class Interruption(BaseException):
    """What is being done is to end now. No `except Exception` on the way stops it."""
