"""How far a dataset was read, while it is read: nothing for a short one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING

from loradeck.cli.display.text import format_size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from loradeck.dataset.source import Position

DELAY = 2.0  # seconds until something is shown
INTERVAL = 0.25  # seconds between two drawings on a terminal
LINE_INTERVAL = 30.0  # seconds between two lines elsewhere


@contextmanager
def reading_progress(console: "Console | None" = None) -> Iterator[Callable[["Position"], None]]:
    """Yield a function to call while a dataset is read; it shows a bar on a terminal, which vanishes, else lines.

    The console is by default that of stderr, because stdout may be data.
    """
    view = _Reading(console)
    try:
        yield view.show
    finally:
        view.close()


class _Reading:
    def __init__(self, console: "Console | None") -> None:
        self.console = console
        self.bar: Progress | None = None
        self.due = perf_counter() + DELAY

    def show(self, position: "Position") -> None:
        if perf_counter() < self.due:
            return
        if self.console is None:
            from rich.console import Console

            self.console = Console(stderr=True)
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            self._draw(self.console, position)
            self.due = perf_counter() + INTERVAL
        else:
            total = f" of {format_size(position.total)}" if position.total else ""
            self.console.print(f"read {format_size(position.done)}{total}")
            self.due = perf_counter() + LINE_INTERVAL

    def _draw(self, console: "Console", position: "Position") -> None:
        from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

        if self.bar is None:
            columns = ("reading", BarColumn(), DownloadColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, console=console, auto_refresh=False, transient=True)
            self.bar.add_task("")
            self.bar.start()
        [task] = self.bar.task_ids
        self.bar.update(task, total=position.total or None, completed=position.done, refresh=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
