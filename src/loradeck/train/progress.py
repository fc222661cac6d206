"""A run on the screen: its plan, then its steps as they come. Knows rich; decides nothing about training."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from loradeck.train.plan import Plan
from loradeck.train.trainer import Step

LINES = 10  # of a run that is written to a file
SHOWN = 600  # characters of each part of the first example


@contextmanager
def progress(console: Console) -> Iterator[Callable[[Step], None]]:
    """Yield an `on_step` for `train`: a moving bar on a terminal, about ten plain lines elsewhere."""
    if not console.is_terminal:
        yield lambda step: _line(console, step)
        return
    with Progress(BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), console=console) as bar:
        task = bar.add_task("reading the first batch", total=None)
        yield lambda step: bar.update(task, description=_text(step), completed=step.step, total=step.steps)


def _line(console: Console, step: Step) -> None:
    if step.step == 1 or step.step % max(1, step.steps // LINES) == 0 or step.step == step.steps:
        console.print(f"step {step.step}/{step.steps} · {_text(step)}", highlight=False)


def _text(step: Step) -> str:
    left = timedelta(seconds=round(step.seconds / step.step * (step.steps - step.step)))
    return f"loss {step.loss:.3f} · {step.tokens_per_second:,.0f} tokens/s · {left} left"


def table(plan: Plan) -> RenderableType:
    """Lay out a plan, with the first example's text beside whether it is read or learned."""
    sizes = Table.grid(padding=(0, 2))
    rows = {
        "adapter": f"{plan.trainable:,} parameters, {plan.adapter_bytes / 1e6:,.1f} MB: "
        f"{plan.ratio:.1%} of the base's {plan.base_bytes / 1e6:,.0f} MB",
        "examples": f"{plan.examples:,}, the longest of {plan.longest:,} tokens, {plan.truncated:,} truncated",
        "tokens": f"{plan.tokens:,}, of which {plan.supervised:,} are learned",
        "steps": f"{plan.schedule.steps:,} of {plan.batch_size:,} examples",
        "learning rate": f"{plan.schedule.peak:.2g}, {plan.schedule.shape} after {plan.schedule.warmup:,} steps of "
        f"warm-up ({plan.schedule.reason})",
    }
    for name, value in rows.items():
        sizes.add_row(Text(name, style="bold"), Text(value))
    first = Table.grid(padding=(0, 2))
    for text, learned in plan.first:
        first.add_row(Text("learned", style="green") if learned else Text("read", style="dim"), Text(_printable(text)))
    return Group(sizes, Text("\nThe first example:", style="bold"), first)


def _printable(text: str) -> str:
    """Shorten a stranger's text and take from it what a terminal would obey."""
    cut = text if len(text) <= SHOWN else text[:SHOWN] + "…"
    return "".join(char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in cut)
