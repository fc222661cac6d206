"""The events of a run; each is a line of its metrics.jsonl."""

from collections.abc import Callable
from typing import Literal, TypeAlias

import msgspec

EndReason: TypeAlias = Literal["finished", "early stop", "stopped", "diverged", "interrupted"]


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", tag=str.lower, omit_defaults=True):
    """Something that happened to one job."""

    job: str
    step: int
    """Optimizer steps that the job has taken."""
    seconds: float
    """Since the run began, including the time before it was resumed."""


class Step(Event, frozen=True):
    """One optimizer step."""

    steps: int
    """Steps that the job will take, unless it stops early."""
    took: float
    """Seconds that its pass took, without what happens between passes, such as evaluations."""
    loss: float
    """Mean over the step's supervised tokens or labels, in nats (over its preference pairs), before the update."""
    learning_rate: float
    grad_norm: float
    """2-norm of the gradient, before clipping."""
    tokens: int
    """Tokens this job has read since the run began, without padding."""
    supervised: int
    """Tokens that this step was trained on; labels of a classifier, preference pairs."""
    memory: int
    """Resident set of the process, in bytes."""
    accuracy: float | None = None
    """Share of the step's labels that are the most likely ones, or of its preference pairs with a margin above 0."""
    margin: float | None = None
    """Preference pairs: mean margin, by how much the chosen answer is preferred (DPO: more than at the start): see
    train.objective."""


class Evaluation(Event, frozen=True):
    """The loss on the validation examples, after a step."""

    loss: float
    """As in Step."""
    tokens: int
    """Number of supervised tokens, labels or preference pairs that the loss is averaged over."""
    best: bool
    """Whether the loss is the lowest so far."""
    accuracy: float | None = None
    """As in Step."""
    margin: float | None = None
    """As in Step."""


class Sample(Event, frozen=True):
    """The adapter's answer to a validation prompt."""

    prompt: str
    expected: str
    answer: str


class End(Event, frozen=True):
    """A job's last event."""

    reason: EndReason
    kept: int
    """The step whose adapter is kept: the one with the lowest validation loss, else the last."""
    detail: str = ""
    """An explanation, if the reason needs one."""


AnyEvent: TypeAlias = Step | Evaluation | Sample | End
Listener: TypeAlias = Callable[[AnyEvent], None]


def encode(event: AnyEvent) -> bytes:
    """Return an event as one line of JSON."""
    return msgspec.json.encode(event) + b"\n"


def decode(line: bytes) -> AnyEvent:
    """Read one line of a metrics.jsonl.

    Raises:
        msgspec.DecodeError: the line is not an event.
    """
    return msgspec.json.decode(line, type=AnyEvent)
