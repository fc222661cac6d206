"""The state of a run, built from its events: each job's curve, speed and state."""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from loradeck.train.events import AnyEvent, End, Evaluation, Step
from loradeck.train.history import tokens_per_second

POINTS = 64  # limit of a curve, however long the run
RECENT = 20  # steps over which speed is measured
BARS = "▁▂▃▄▅▆▇█"


@dataclass(slots=True)
class Curve:
    """A series of any length as fewer than POINTS points, each the mean of the same number of values."""

    points: list[float] = field(default_factory=list)
    each: int = 1
    """Values per point."""
    pending: list[float] = field(default_factory=list)

    def add(self, value: float) -> None:
        """Append a value. Values that are not finite are dropped, as they would flatten all others."""
        if not math.isfinite(value):
            return
        self.pending.append(value)
        if len(self.pending) == self.each:
            self.points.append(math.fsum(self.pending) / self.each)
            self.pending.clear()
        if len(self.points) == POINTS:
            self.points = [(one + two) / 2 for one, two in zip(self.points[::2], self.points[1::2], strict=True)]
            self.each *= 2

    def bars(self, width: int) -> str:
        """Draw the curve in at most `width` characters, from its lowest point to its highest."""
        count = min(width, len(self.points))
        edges = [at * len(self.points) // count for at in range(count + 1)] if count else []
        means = [math.fsum(self.points[a:b]) / (b - a) for a, b in pairwise(edges)]
        low, high = min(means, default=0.0), max(means, default=0.0)
        return "".join(BARS[round((mean - low) / (high - low or 1) * (len(BARS) - 1))] for mean in means)


@dataclass(slots=True)
class Job:
    """The state of one job."""

    name: str
    steps: int = 0
    """Total number; 0 until known."""
    curve: Curve = field(default_factory=Curve)
    """The losses."""
    recent: deque[Step] = field(default_factory=lambda: deque(maxlen=RECENT + 1))
    validation: Evaluation | None = None
    """The last evaluation."""
    end: End | None = None

    @property
    def step(self) -> Step | None:
        """The last step."""
        return self.recent[-1] if self.recent else None

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second over the recent steps; None before the second step."""
        return tokens_per_second([*self.recent])

    @property
    def left(self) -> float | None:
        """Seconds to the last step at the recent speed; None before the second step."""
        if len(self.recent) < 2:
            return None
        first, last = self.recent[0], self.recent[-1]
        return (last.seconds - first.seconds) / (last.step - first.step) * (last.steps - last.step)

    @property
    def running(self) -> bool:
        """Whether it has made a step and has not ended."""
        return self.step is not None and self.end is None


class ProgressState:
    """The state of all jobs of a run."""

    def __init__(self, jobs: Mapping[str, int] | None = None) -> None:
        """`jobs` maps names to steps; other jobs are added with their first event."""
        self.jobs = {name: Job(name, steps) for name, steps in (jobs or {}).items()}
        self.seconds = 0.0
        """From the start of the run to its last event."""
        self.memory = 0
        """Bytes used by the process."""
        self.peak = 0
        """Maximum of memory."""

    def update(self, event: AnyEvent) -> Job:
        """Apply an event and return its job."""
        job = self.jobs.setdefault(event.job, Job(event.job))
        self.seconds = max(self.seconds, event.seconds)
        if isinstance(event, Step):
            job.steps = event.steps
            job.curve.add(event.loss)
            job.recent.append(event)
            self.memory, self.peak = event.memory, max(self.peak, event.memory)
        elif isinstance(event, Evaluation):
            job.validation = event
        elif isinstance(event, End):
            job.end = event
        return job

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of all running jobs."""
        return math.fsum(job.tokens_per_second or 0.0 for job in self.jobs.values() if job.running)

    def first(self, most: int | None = None) -> list[Job]:
        """Return at most `most` jobs: first those that run, then those that wait, then those that ended."""
        return sorted(self.jobs.values(), key=lambda job: (not job.running, job.end is not None))[:most]
