"""The errors this library raises on purpose. Knows nothing of ours.

LoradeckError            says what is wrong, every problem found, and how to fix it
├── ConfigError          a setting that cannot be (a rank of 0, a learning rate of -1)
├── TargetError          a target that matches no module, or a module that takes no adapter
├── AdapterNameError     a name that is taken, or that no file or route could carry
├── UnknownAdapterError  no resident or stored adapter has this name
├── RouteError           a route that does not fit its batch
├── AdapterError         an adapter's folder that cannot be read, written, or does not fit the base
│   └── UnsupportedError a feature of the file that this library refuses rather than half-loads
├── BaseModelError       a base model that cannot be found or loaded
├── DataError            a dataset that cannot be trained on; names the file and the line
├── TrainingError        a run that cannot go on: it diverged, or what it left is not what it would resume
├── BusyError            no request is taken now: too many wait, or the engine is about to end
└── RequestError         a request that failed while others went on
"""

from collections.abc import Sequence

SHOWN = 12  # problems spelled out in a message; all of them stay in `.problems`


class LoradeckError(Exception):
    """What is wrong, each problem found, and how to fix it.

    `str(error)` is one line, then one line with the hint where there is one.
    """

    def __init__(self, message: str, problems: Sequence[str] = (), *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.problems = tuple(problems)
        self.hint = hint

    def __str__(self) -> str:
        return self._text(": ", "; ")

    def told(self) -> str:
        """Return what `str` does, for a terminal: where there are several problems, each on a line of its own."""
        return self._text(":\n  ", "\n  ") if len(self.problems) > 1 else str(self)

    def _text(self, first: str, between: str) -> str:
        rest = len(self.problems) - SHOWN
        parts = [*self.problems[:SHOWN], *([f"and {rest} more"] if rest > 0 else [])]
        text = self.message + (first + between.join(parts) if parts else "")
        return f"{text}\n{self.hint}" if self.hint else text


class ConfigError(LoradeckError):
    """A setting that cannot be."""


class TargetError(LoradeckError):
    """A target that matches no module, or a module that takes no adapter."""


class AdapterNameError(LoradeckError):
    """A name that is taken, or that no file or route could carry."""


class UnknownAdapterError(LoradeckError):
    """No resident or stored adapter has this name."""


class RouteError(LoradeckError):
    """A route that does not fit its batch."""


class AdapterError(LoradeckError):
    """An adapter's folder that cannot be read, written, or does not fit the base."""


class UnsupportedError(AdapterError):
    """A feature of the file that this library refuses rather than half-loads."""


class BaseModelError(LoradeckError):
    """A base model that cannot be found or loaded."""


class DataError(LoradeckError):
    """A dataset that cannot be trained on; names the file and the line."""


class TrainingError(LoradeckError):
    """A run that cannot go on."""


class BusyError(LoradeckError):
    """No request is taken now. `retry_after` is the number of seconds after which to ask again."""

    def __init__(self, message: str, *, retry_after: float, hint: str = "") -> None:
        super().__init__(message, hint=hint or f"Ask again after {retry_after:.0f} s.")
        self.retry_after = retry_after


class RequestError(LoradeckError):
    """A request that failed while others went on."""
