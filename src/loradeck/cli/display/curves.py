"""The curves of a plot: a job's values, raw and smoothed, and its evaluations."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeAlias

from loradeck.cli.display.text import printable
from loradeck.train.events import Evaluation
from loradeck.train.history import JobHistory, tokens_per_second

Metric: TypeAlias = Literal["loss", "validation", "learning_rate", "tokens_per_second"]
Point: TypeAlias = tuple[int, float]
"""A step and its value."""
SPAN = 25  # a smoothed value averages about 1/25 of the run


@dataclass(frozen=True, slots=True)
class Curve:
    """One job's line, and the evaluations marked on it."""

    label: str
    raw: list[Point]
    smooth: list[Point]
    """The line: the raw values, or their exponential mean if they are noisy."""
    marks: list[Point]
    """Validation losses."""
    best: Point | None
    """The lowest of the marks."""

    @property
    def points(self) -> list[Point]:
        """The line and its marks."""
        return [*self.smooth, *self.marks]


def curve(label: str, track: JobHistory, metric: Metric) -> Curve:
    """Return a job's curve of a metric; only the loss and tokens per second are smoothed."""
    marks = [(each.step, each.loss) for each in track.evaluations] if metric in ("loss", "validation") else []
    best = track.best if marks else None
    raw: Sequence[tuple[int, float | None]]
    if metric == "validation":
        raw = marks
    elif metric == "tokens_per_second":
        raw = [(pair[-1].step, tokens_per_second(pair)) for pair in pairwise(track.steps)]
    else:
        raw = [(step.step, getattr(step, metric)) for step in track.steps]
    finite = [(step, value) for step, value in raw if value is not None and math.isfinite(value)]
    noisy = metric in ("loss", "tokens_per_second")
    return Curve(label, finite, smoothed(finite) if noisy else finite, marks, _point(best) if best else None)


def _point(evaluation: Evaluation) -> Point:
    return evaluation.step, evaluation.loss


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Return the exponential mean of the values, with Adam's bias correction (arXiv:1412.6980, section 3)."""
    keep = 1 - 2 / (max(1, len(points) / SPAN) + 1)
    mean = 0.0
    means: list[Point] = []
    for count, (step, value) in enumerate(points, 1):
        mean = keep * mean + (1 - keep) * value
        means.append((step, mean / (1 - keep**count)))
    return means


def curves(runs: Mapping[str, Mapping[str, JobHistory]], metric: Metric) -> list[Curve]:
    """Return the curves of several runs (name -> job -> track) that have values of a metric, labelled run/job."""
    candidates = [
        curve(printable(job if job == run.rpartition("/")[2] else f"{run}/{job}"), track, metric)
        for run, tracks in runs.items()
        for job, track in tracks.items()
    ]
    return [each for each in candidates if each.points]
