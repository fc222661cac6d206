"""Read a run's metrics.jsonl back: the history of each job."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from loradeck.errors import LoradeckError
from loradeck.train.events import AnyEvent, End, Evaluation, Sample, Step, decode

METRICS = "metrics.jsonl"


@dataclass(slots=True)
class JobHistory:
    """The events of one job, by step.

    A resumed run repeats some steps: they count once, and an End before them does not count.
    """

    steps: list[Step] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    end: End | None = None

    def add(self, event: AnyEvent) -> None:
        """Append an event. A step replaces all earlier events of the same and later steps."""
        if isinstance(event, End):
            self.end = event
        elif isinstance(event, Evaluation):
            _truncate(self.evaluations, event.step)
            self.evaluations.append(event)
        elif isinstance(event, Step):
            _truncate(self.steps, event.step)
            _truncate(self.evaluations, event.step)
            self.end = None
            self.steps.append(event)

    @property
    def best(self) -> Evaluation | None:
        """The evaluation with the lowest loss."""
        return next((evaluation for evaluation in reversed(self.evaluations) if evaluation.best), None)


def _truncate(events: list[Step] | list[Evaluation], step: int) -> None:
    while events and events[-1].step >= step:
        events.pop()


def tokens_per_second(steps: Sequence[Step]) -> float | None:
    """Return a job's tokens per second in successive steps after the first of them; None if these took no time."""
    seconds = math.fsum(step.took for step in steps[1:])
    return (steps[-1].tokens - steps[0].tokens) / seconds if seconds > 0 else None


def read_history(path: Path) -> dict[str, JobHistory]:
    """Return the history of each job of a run (its folder, or its metrics.jsonl), in order of first appearance.

    A last line that a kill cut short is ignored. Samples are validated and left out.

    Raises:
        LoradeckError: the file does not exist, has no events, or has invalid lines; each is named.
    """
    file = path / METRICS if path.is_dir() else path
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise LoradeckError(
            f"{file} cannot be read: {error.strerror}", hint=f"Name a run's folder, or its {METRICS}."
        ) from error
    jobs: dict[str, JobHistory] = {}
    problems: list[str] = []
    for number, line in enumerate(lines, 1):
        try:
            event = decode(line) if line else None  # after the last newline comes an empty line
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            if number < len(lines):
                problems.append(f"{file}:{number}: {error}")
            continue
        if event is not None and not isinstance(event, Sample):
            jobs.setdefault(event.job, JobHistory()).add(event)
    if problems:
        raise LoradeckError(
            f"{file} has lines that are not events of a run", problems, hint="Remove them, or name another run."
        )
    if not jobs:
        raise LoradeckError(f"{file} has no events", hint="The run has taken no step yet, or this is not a run.")
    return jobs
