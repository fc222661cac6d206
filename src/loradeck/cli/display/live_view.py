"""A run in the terminal: the table of its plan, then a live view of its jobs."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from time import perf_counter

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from loradeck.cli.display.progress_state import Job, ProgressState
from loradeck.cli.display.text import label_counts
from loradeck.train.events import AnyEvent, End, Evaluation, Listener, Sample, Step
from loradeck.train.plan import Plan

LINES = 10  # steps of a job that are printed if there is no terminal
CHARACTERS = 600  # printed of each part of an example
INTERVAL = 0.25  # minimum seconds between two drawings
SHARE = 0.01  # maximum share of the time spent drawing
MARGIN = 3  # lines besides the jobs: the header, the number of hidden jobs, the totals
DROPPED = (
    "rate",
    "tokens/s",
    "curve",
    "margin",
    "accuracy",
    "left",
    "validation",
    "loss",
)  # in this order, if it is narrow
FLEXIBLE = {"job": 8, "curve": 4}  # columns that take what is left, and their least width
WIDEST = 24  # of them
GAP = 2  # between columns
COLOURS = {"running": "green", "early stop": "yellow", "stopped": "yellow", "interrupted": "yellow", "diverged": "red"}


@contextmanager
def progress(console: Console, jobs: Mapping[str, int] | None = None) -> Iterator[Listener]:
    """Yield a listener for a run's events that shows a live view on a terminal, and prints lines elsewhere.

    `jobs` maps the names of the jobs known in advance to their steps. The live view has a line per job and is redrawn
    by events, at most a few times a second; samples and the reasons why jobs ended stay above it. Without a terminal,
    or with TERM=dumb, a job prints about ten lines, and one for each evaluation and its end.
    """
    state = ProgressState(jobs)
    if not console.is_terminal or console.is_dumb_terminal:
        yield partial(_print_line, console, state)
        return
    with Live(console=console, auto_refresh=False) as live:
        live_view = _LiveView(state, live)
        try:
            yield live_view.listen
        finally:
            live_view.draw(every=True)


class _LiveView:
    """Redraws the state of a run on an event, unless it was drawn just before."""

    def __init__(self, state: ProgressState, live: Live) -> None:
        self.state, self.live, self.due = state, live, 0.0
        self.draw()

    def listen(self, event: AnyEvent) -> None:
        self.state.update(event)
        if isinstance(event, Sample):
            self.live.console.print(_sample(event))
        elif isinstance(event, End) and event.detail:
            self.live.console.print(Text(f"{event.job}: {event.reason}: {_excerpt(event.detail)}"))
        if perf_counter() >= self.due:
            self.draw()

    def draw(self, *, every: bool = False) -> None:
        start = perf_counter()
        self.live.update(view(self.state, None if every else max(1, self.live.console.height - MARGIN)), refresh=True)
        end = perf_counter()
        self.due = end + max(INTERVAL, (end - start) / SHARE)


def view(state: ProgressState, most: int | None = None) -> RenderableType:
    """Return a table of at most `most` jobs, a line each, and the totals of all."""
    jobs = state.first(most)
    rest = len(state.jobs) - len(jobs)
    more = [Text(f"and {rest} more", style="dim")] if rest else []
    totals = [f"{state.tokens_per_second:,.0f} tokens/s", _time(state.seconds)]
    if state.peak:  # of a server's jobs it is not known
        totals.insert(1, f"memory {_gigabytes(state.memory)}, peak {_gigabytes(state.peak)}")
    return Group(_Jobs(jobs), *more, Text(" · ".join(totals), style="dim", no_wrap=True, overflow="ellipsis"))


class _Jobs:
    """A table of jobs, without the columns that the width has no room for: a number is whole or absent."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.columns: dict[str, list[RenderableType]] = {
            "job": [Text(job.name) for job in jobs],
            "step": [_steps(job) for job in jobs],
            "curve": [_Bars(job) for job in jobs],
            "loss": [_loss(job.step) for job in jobs],
            "validation": [_validation(job.validation) for job in jobs],
            "accuracy": [_accuracy(job.step) for job in jobs],
            "margin": [_margin(job.step) for job in jobs],
            "rate": [f"{job.step.learning_rate:.2g}" if job.step else "" for job in jobs],
            "tokens/s": [_speed(job) for job in jobs],
            "left": [_state(job) for job in jobs],
        }
        for name in ("accuracy", "margin"):
            if not any(job.step and getattr(job.step, name) is not None for job in jobs):
                del self.columns[name]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        widths = {
            head: max([len(head), *(cell_len(str(cell)) for cell in cells)])
            for head, cells in self.columns.items()
            if head not in FLEXIBLE
        }
        heads = [*self.columns]
        for dropped in DROPPED:
            least = sum(FLEXIBLE.get(head, widths.get(head, 0)) + GAP for head in heads) - GAP
            if least <= options.max_width:
                break
            heads = [head for head in heads if head != dropped]
        yield self._table(heads, widths, options.max_width)

    def _table(self, heads: Sequence[str], widths: dict[str, int], width: int) -> Table:
        room = width - sum(widths.get(head, 0) + GAP for head in heads) + GAP
        name = max([3, *(cell_len(str(cell)) for cell in self.columns["job"])])
        flexible = {"job": max(1, min(name, WIDEST, room - FLEXIBLE["curve"] * ("curve" in heads)))}
        flexible["curve"] = max(1, min(WIDEST, room - flexible["job"]))
        table = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, header_style="dim")
        for head in heads:
            table.add_column(
                "" if head == "curve" else head,
                justify="left" if head in FLEXIBLE or head == "left" else "right",
                no_wrap=True,
                overflow="ellipsis",
                width=flexible.get(head, widths.get(head)),
            )
        for row in zip(*(self.columns[head] for head in heads), strict=True):
            table.add_row(*row)
        return table


class _Bars:
    """A job's losses as a bar chart of the available width."""

    def __init__(self, job: Job) -> None:
        self.curve = job.curve

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.curve.bars(options.max_width), style="cyan", no_wrap=True, end="")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, min(24, options.max_width))


def _print_line(console: Console, state: ProgressState, event: AnyEvent) -> None:
    job = state.update(event)
    if line := _line(job, event):
        console.print(Text(f"{job.name}: {line}"), soft_wrap=True)


def _line(job: Job, event: AnyEvent) -> str:
    """Return the line of an event, or an empty string for most of a job's steps."""
    if isinstance(event, Step):
        if event.step not in (1, event.steps) and event.step % math.ceil(event.steps / LINES):
            return ""
        parts = [f"step {_steps(job)}", f"loss {_loss(event)}", *_quality(event)]
        parts += [f"{job.tokens_per_second:,.0f} tokens/s"] if job.tokens_per_second is not None else []
        parts += [f"{_time(job.left)} left"] if job.left is not None else []
        return " · ".join(parts)
    if isinstance(event, Evaluation):
        parts = [f"step {event.step}", f"validation loss {_loss(event)}{', best so far' if event.best else ''}"]
        return " · ".join([*parts, *_quality(event)])
    if isinstance(event, End):
        detail = f" · {_excerpt(event.detail)}" if event.detail else ""
        return f"{event.reason} after step {event.step} · kept step {event.kept}{detail}"
    return ""


def _state(job: Job) -> Text:
    if job.end:
        best = f", kept {job.end.kept}" if job.end.kept != job.end.step else ""
        return Text(f"{job.end.reason}{best}", style=COLOURS.get(job.end.reason, ""))
    if job.step is None:
        return Text("waiting", style="dim")
    return Text("running" if job.left is None else _time(job.left), style=COLOURS["running"])


def _steps(job: Job) -> str:
    return f"{job.step.step if job.step else 0}/{job.steps or '?'}"


def _loss(event: Step | Evaluation | None) -> str:
    return "" if event is None else f"{event.loss:.3f}"


def _accuracy(event: Step | Evaluation | None) -> str:
    return "" if event is None or event.accuracy is None else f"{event.accuracy:.0%}"


def _margin(event: Step | Evaluation | None) -> str:
    return "" if event is None or event.margin is None else f"{event.margin:.1f}"


def _quality(event: Step | Evaluation) -> list[str]:
    values = {"accuracy": _accuracy(event), "margin": _margin(event)}
    return [", ".join(f"{name} {value}" for name, value in values.items() if value)] if any(values.values()) else []


def _speed(job: Job) -> str:
    return f"{job.tokens_per_second:,.0f}" if job.running and job.tokens_per_second is not None else ""


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
        lines.add_row(Text(name, style="bold" if name == "answer" else "dim"), Text(_excerpt(getattr(sample, name))))
    return Group(Text(f"{sample.job}, step {sample.step}", style="bold"), lines)


def plan_table(plan: Plan) -> RenderableType:
    """Return a plan's sizes, its settings with their reasons, and its first example with its mask."""
    sizes = Table.grid(padding=(0, 2))
    rows = {
        "adapter": f"{plan.name}: {plan.trainable:,} parameters, {plan.adapter_bytes / 1e6:,.1f} MB: "
        f"{plan.ratio:.1%} of the base's {plan.base_bytes / 1e6:,.0f} MB",
        **({"left out": plan.left_out} if plan.left_out else {}),
        "examples": f"{plan.examples:,} ({plan.form}), at most {plan.longest:,} tokens, {plan.truncated:,} "
        f"truncated; {plan.valid:,} for validation",
        **({"data": "\n".join(map(_excerpt, plan.notes))} if plan.notes else {}),
        "tokens": f"{plan.tokens:,} per epoch, "
        + (f"with {plan.supervised:,} labels" if plan.labels else f"of which {plan.supervised:,} are learned"),
        **({"labels": label_counts(plan.labels)} if plan.labels else {}),
        "steps": f"{plan.schedule.steps:,} of {plan.batch_size:,} examples",
        "learning rate": f"{plan.schedule.peak:.2g}, {plan.schedule.decay} after "
        f"{plan.schedule.warmup:,} step{'s' * (plan.schedule.warmup != 1)} of warm-up ({plan.schedule.reason})",
    }
    for name, value in rows.items():
        sizes.add_row(Text(name, style="bold"), Text(value))
    settings = Table.grid(padding=(0, 2))
    for name, (value, reason) in plan.settings.items():
        settings.add_row(Text(name, style="bold"), Text(_excerpt(value)), Text(reason, style="dim"))
    first = Table.grid(padding=(0, 2))
    for text, learned in plan.first:
        first.add_row(Text("learned", style="green") if learned else Text("read", style="dim"), Text(_excerpt(text)))
    return Group(sizes, Text(), settings, Text("\nThe first example:", style="bold"), first)


def _excerpt(text: str) -> str:
    """Shorten an untrusted text and replace the control characters in it."""
    if len(text) > CHARACTERS:
        text = text[:CHARACTERS] + "…"
    return "".join(char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in text)
