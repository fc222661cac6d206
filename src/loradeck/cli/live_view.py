"""A run on the screen: its plan, then its jobs as they go. Knows rich; decides nothing about training."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from time import perf_counter

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from loradeck.cli.plan import Plan
from loradeck.cli.progress_state import Board, Job
from loradeck.train.events import AnyEvent, End, Evaluation, Listener, Sample, Step

LINES = 10  # of a job that is written to a file
SHOWN = 600  # characters of each part of an example
REST = 0.25  # seconds between two drawings, at least
SHARE = 0.01  # of the time that drawing may take
AROUND = 3  # lines about the jobs: the head, what is left out, the sums
COLOURS = {"running": "green", "early stop": "yellow", "stopped": "yellow", "interrupted": "yellow", "diverged": "red"}


@contextmanager
def progress(console: Console, jobs: Mapping[str, int] | None = None) -> Iterator[Listener]:
    """Yield what a run's events are told to: a live view on a terminal, plain lines elsewhere.

    `jobs` are those known before they begin, as name -> steps. The live view has a line a job and is drawn by the
    events themselves, a few times a second at most; samples and why a job ended stay above it. Elsewhere, or where
    TERM is dumb, a job has about ten lines, and one for each evaluation and its end.
    """
    board = Board(jobs)
    if not console.is_terminal or console.is_dumb_terminal:
        yield partial(_print_line, console, board)
        return
    with Live(console=console, auto_refresh=False) as live:
        screen = _Screen(board, live)
        try:
            yield screen.hear
        finally:
            screen.draw(every=True)


class _Screen:
    """Draws a board when an event comes and the last drawing was long enough ago."""

    def __init__(self, board: Board, live: Live) -> None:
        self.board, self.live, self.due = board, live, 0.0
        self.draw()

    def hear(self, event: AnyEvent) -> None:
        self.board.hear(event)
        if isinstance(event, Sample):
            self.live.console.print(_sample(event))
        elif isinstance(event, End) and event.detail:
            self.live.console.print(Text(f"{event.job}: {event.reason}: {_printable(event.detail)}"))
        if perf_counter() >= self.due:
            self.draw()

    def draw(self, *, every: bool = False) -> None:
        began = perf_counter()
        self.live.update(view(self.board, None if every else max(1, self.live.console.height - AROUND)), refresh=True)
        ended = perf_counter()
        self.due = ended + max(REST, (ended - began) / SHARE)


def view(board: Board, most: int | None = None) -> RenderableType:
    """Lay out at most so many jobs of a board, a line each, and below them what they come to."""
    jobs = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    jobs.add_column("job", overflow="ellipsis", no_wrap=True, max_width=24)
    jobs.add_column("step", justify="right", no_wrap=True)
    jobs.add_column("loss")  # the one column that gives way where a screen is narrow
    for head in ("", "validation", "rate", "tokens/s"):
        jobs.add_column(head, justify="right", no_wrap=True)
    jobs.add_column("left", no_wrap=True)
    shown = board.first(most)
    for job in shown:
        jobs.add_row(
            Text(job.name),
            _steps(job),
            _Bars(job),
            _loss(job.step),
            _validation(job.validation),
            f"{job.step.learning_rate:.2g}" if job.step else "",
            f"{job.pace:,.0f}" if job.running and job.pace is not None else "",
            _state(job),
        )
    rest = len(board.jobs) - len(shown)
    more = [Text(f"and {rest} more", style="dim")] if rest else []
    sums = f"{board.pace:,.0f} tokens/s · memory {_gigabytes(board.memory)}, at most {_gigabytes(board.peak)}"
    last = Text(f"{sums} · {_time(board.seconds)}", style="dim", no_wrap=True, overflow="ellipsis")
    return Group(jobs, *more, last)


class _Bars:
    """A job's losses as bars, as wide as there is room."""

    def __init__(self, job: Job) -> None:
        self.curve = job.curve

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.curve.bars(options.max_width), style="cyan", no_wrap=True, end="")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, min(24, options.max_width))


def _print_line(console: Console, board: Board, event: AnyEvent) -> None:
    job = board.hear(event)
    if line := _line(job, event):
        console.print(Text(f"{job.name}: {line}"), soft_wrap=True)


def _line(job: Job, event: AnyEvent) -> str:
    """Say an event in a line, or nothing where it is none of a job's ten steps."""
    if isinstance(event, Step):
        if event.step not in (1, event.steps) and event.step % math.ceil(event.steps / LINES):
            return ""
        parts = [f"step {_steps(job)}", f"loss {_loss(event)}"]
        parts += [f"{job.pace:,.0f} tokens/s"] if job.pace is not None else []
        parts += [f"{_time(job.left)} left"] if job.left is not None else []
        return " · ".join(parts)
    if isinstance(event, Evaluation):
        return f"step {event.step} · validation loss {_loss(event)}{', the best so far' if event.best else ''}"
    if isinstance(event, End):
        detail = f" · {_printable(event.detail)}" if event.detail else ""
        return f"{event.reason} after step {event.step} · kept that of step {event.kept}{detail}"
    return ""


def _state(job: Job) -> Text:
    if job.end:
        kept = f", kept {job.end.kept}" if job.end.kept != job.end.step else ""
        return Text(f"{job.end.reason}{kept}", style=COLOURS.get(job.end.reason, ""))
    if job.step is None:
        return Text("waiting", style="dim")
    return Text("running" if job.left is None else _time(job.left), style=COLOURS["running"])


def _steps(job: Job) -> str:
    return f"{job.step.step if job.step else 0}/{job.steps or '?'}"


def _loss(event: Step | Evaluation | None) -> str:
    if event is None:
        return ""
    return f"{event.loss:.3f}" + (f" {event.accuracy:.0%}" if event.accuracy is not None else "")


def _validation(evaluation: Evaluation | None) -> Text:
    best = evaluation is not None and evaluation.best
    return Text(_loss(evaluation) + (" ★" if best else "  "), style="green" if best else "")


def _time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def _sample(sample: Sample) -> RenderableType:
    lines = Table.grid(padding=(0, 2))
    for name in ("prompt", "expected", "answer"):
        lines.add_row(Text(name, style="bold" if name == "answer" else "dim"), Text(_printable(getattr(sample, name))))
    return Group(Text(f"{sample.job}, step {sample.step}", style="bold"), lines)


def table(plan: Plan) -> RenderableType:
    """Lay out a plan: sizes, settings with their reasons, and what of the first example is read or learned."""
    sizes = Table.grid(padding=(0, 2))
    rows = {
        "adapter": f"{plan.name}: {plan.trainable:,} parameters, {plan.adapter_bytes / 1e6:,.1f} MB: "
        f"{plan.ratio:.1%} of the base's {plan.base_bytes / 1e6:,.0f} MB",
        "examples": f"{plan.examples:,} ({plan.form}), the longest of {plan.longest:,} tokens, {plan.truncated:,} "
        f"truncated; {plan.valid:,} to validate on",
        "tokens": f"{plan.tokens:,}, of which {plan.supervised:,} are learned",
        "steps": f"{plan.schedule.steps:,} of {plan.batch_size:,} examples",
        "learning rate": f"{plan.schedule.peak:.2g}, {plan.schedule.decay} after "
        f"{plan.schedule.warmup:,} step{'s' * (plan.schedule.warmup != 1)} of warm-up ({plan.schedule.reason})",
    }
    for name, value in rows.items():
        sizes.add_row(Text(name, style="bold"), Text(value))
    settings = Table.grid(padding=(0, 2))
    for name, (value, reason) in plan.settings.items():
        settings.add_row(Text(name, style="bold"), Text(_printable(value)), Text(reason, style="dim"))
    first = Table.grid(padding=(0, 2))
    for text, learned in plan.first:
        first.add_row(Text("learned", style="green") if learned else Text("read", style="dim"), Text(_printable(text)))
    return Group(sizes, Text(), settings, Text("\nThe first example:", style="bold"), first)


def _printable(text: str) -> str:
    """Shorten a stranger's text and take from it what a terminal would obey."""
    cut = text if len(text) <= SHOWN else text[:SHOWN] + "…"
    return "".join(char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in cut)
