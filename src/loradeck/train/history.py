"""A run's metrics.jsonl, read back: one track a job. Knows events and files; draws nothing."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from loradeck.errors import LoradeckError
from loradeck.train.events import AnyEvent, End, Evaluation, Sample, Step, decode

METRICS = "metrics.jsonl"


@dataclass(slots=True)
class Track:
    """What happened to one job, by step.

    A resumed run does some steps again: they count once, and an End before them was none.
    """

    steps: list[Step] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    end: End | None = None

    def add(self, event: AnyEvent) -> None:
        """Append an event; a step takes the place of all that was told of it and of what came after."""
        if isinstance(event, End):
            self.end = event
        elif isinstance(event, Evaluation):
            _cut(self.evaluations, event.step)
            self.evaluations.append(event)
        elif isinstance(event, Step):
            _cut(self.steps, event.step)
            _cut(self.evaluations, event.step)
            self.end = None
            self.steps.append(event)

    @property
    def best(self) -> Evaluation | None:
        """The evaluation with the lowest loss."""
        return next((evaluation for evaluation in reversed(self.evaluations) if evaluation.best), None)


def _cut(events: list[Step] | list[Evaluation], step: int) -> None:
    while events and events[-1].step >= step:
        events.pop()


def pace(steps: Sequence[Step]) -> float | None:
    """Return a job's tokens per second in successive steps after the first of them, None where these took no time."""
    took = math.fsum(step.took for step in steps[1:])
    return (steps[-1].tokens - steps[0].tokens) / took if took > 0 else None


def read_history(path: Path) -> dict[str, Track]:
    """Return what a run (its folder, or its metrics.jsonl) tells of each job, in the order of their first events.

    A last line that a kill cut short is passed over. Samples are checked and left out.

    Raises:
        LoradeckError: there is no such file, it holds no event, or lines of it are none; each is named.
    """
    file = path / METRICS if path.is_dir() else path
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise LoradeckError(
            f"{file} cannot be read: {error.strerror}", hint=f"Name a run's folder, or its {METRICS}."
        ) from error
    tracks: dict[str, Track] = {}
    problems: list[str] = []
    for number, line in enumerate(lines, 1):
        try:
            event = decode(line) if line else None  # nothing follows the last line's end
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            if number < len(lines):
                problems.append(f"{file}:{number}: {error}")
            continue
        if event is not None and not isinstance(event, Sample):
            tracks.setdefault(event.job, Track()).add(event)
    if problems:
        raise LoradeckError(
            f"{file} has lines that are no events of a run", problems, hint="Take them out, or name another run."
        )
    if not tracks:
        raise LoradeckError(f"{file} holds no event", hint="The run has made no step yet, or is no run.")
    return tracks
