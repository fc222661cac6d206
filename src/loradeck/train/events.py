"""What a run tells while it goes, and what its metrics.jsonl holds: one event, one line. Knows no tensors."""

from collections.abc import Callable
from typing import Literal, TypeAlias

import msgspec


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", tag=str.lower, omit_defaults=True):
    """Something that happened to one job."""

    job: str
    step: int
    """Optimizer steps that the job has made."""
    seconds: float
    """Since the run began, what was before a resume included."""


class Step(Event, frozen=True):
    """One optimizer step."""

    steps: int
    """That the job will make, unless it stops early."""
    took: float
    """Seconds of the pass that made it; what lies between passes, as evaluations, is not counted."""
    loss: float
    """Mean over the step's supervised tokens, in nats (DPO: over its pairs), before the update."""
    learning_rate: float
    grad_norm: float
    """2-norm of the gradient, before clipping."""
    tokens: int
    """Read by this job since the run began, none of them padding."""
    supervised: int
    """The tokens of this step that were learned (DPO: its pairs)."""
    memory: int
    """Bytes the process holds (resident set)."""
    accuracy: float | None = None
    """DPO: share of the step's pairs whose chosen answer is rated above the rejected one."""


class Evaluation(Event, frozen=True):
    """The loss on the validation examples, after a step."""

    loss: float
    """As in Step."""
    tokens: int
    """Supervised tokens (DPO: pairs) it is the mean of."""
    best: bool
    """Whether it is the lowest so far."""
    accuracy: float | None = None
    """As in Step."""


class Sample(Event, frozen=True):
    """What the adapter answers to a validation prompt."""

    prompt: str
    expected: str
    answer: str


class End(Event, frozen=True):
    """A job's last event."""

    reason: Literal["finished", "early stop", "stopped", "diverged", "interrupted"]
    kept: int
    """The step whose adapter is kept: the best by validation loss, else the last."""
    detail: str = ""
    """In words, where the reason needs them."""


AnyEvent: TypeAlias = Step | Evaluation | Sample | End
Listener: TypeAlias = Callable[[AnyEvent], None]


def encode(event: AnyEvent) -> bytes:
    """Return an event as one line of JSON."""
    return msgspec.json.encode(event) + b"\n"


def decode(line: bytes) -> AnyEvent:
    """Read one line of a metrics.jsonl.

    Raises:
        msgspec.DecodeError: it is not such a line.
    """
    return msgspec.json.decode(line, type=AnyEvent)
