"""`loradeck plot`: the metrics of runs as curves, in the terminal or as a picture, without torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from loradeck.cli.display.curves import Curve, Metric
from loradeck.cli.display.text import printable
from loradeck.errors import ConfigError, LoradeckError

NAMES: dict[Metric, str] = {
    "loss": "loss (nats)",
    "validation": "validation loss (nats)",
    "learning_rate": "learning rate",
    "tokens_per_second": "tokens per second",
}
MARGIN = 5  # rows for the chart's axis, its title and the shell's prompt


def plot(*runs: Path, output: Annotated[Path | None, Parameter(alias="-o")] = None, metric: Metric = "loss") -> None:
    """Plot the metrics of runs, one curve per job.

    The loss is smoothed; validation losses are marked on it, the best with a
    star. Several runs share one plot.

    Args:
        runs: Folders of runs, or their metrics.jsonl files.
        output: Write a picture, such as plot.png or plot.svg, instead.
        metric: The metric to plot.
    """
    from loradeck.cli.display.curves import curves
    from loradeck.train.history import read_history

    if not runs:
        raise ConfigError("no run to plot", hint="Give the folders of one or more runs.")
    lines = curves(dict(zip(_names(runs), map(read_history, runs), strict=True)), metric)
    if not lines:
        raise LoradeckError(
            f"no {NAMES[metric].partition(' (')[0]} in {', '.join(map(str, runs))}",
            hint="Wait for the first step or evaluation; a job without validation examples has no evaluation.",
        )
    if output:
        _picture(lines, metric, output)
        return
    from rich.console import Console

    from loradeck.cli.display.chart import chart

    console = Console(highlight=False)
    height = max(8, min(24, console.height - len(lines) - MARGIN))
    colour = console.is_terminal and console.color_system is not None
    console.print(NAMES[metric])
    console.print(chart(lines, console.width, height, colour=colour), soft_wrap=True, end="")


def _names(runs: Sequence[Path]) -> list[str]:
    """Return a name for each run: its folder's name, or the folder's path if two names are the same."""
    folders = [run if run.is_dir() else run.parent for run in runs]
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _picture(curves: Sequence[Curve], metric: Metric, file: Path) -> None:
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ModuleNotFoundError as error:
        raise LoradeckError(
            "a picture needs matplotlib, which is not installed",
            hint="Run pip install 'loradeck[plot]', or plot in the terminal without --output.",
        ) from error
    figure = Figure(figsize=(9, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel=NAMES[metric])
    many = len(curves) > 10  # more than tab10 has colours
    handles: list[Line2D] = []
    for number, each in enumerate(curves):
        colour = colormaps["turbo"](number / (len(curves) - 1)) if many else colormaps["tab10"](number)
        if each.raw != each.smooth:
            axes.plot(*zip(*each.raw, strict=True), color=colour, alpha=0.2, linewidth=0.8)
        handles += axes.plot(*zip(*each.smooth or each.marks, strict=True), color=colour, linewidth=1.5)
        if each.marks:
            axes.plot(*zip(*each.marks, strict=True), color=colour, linestyle="", marker="o", markersize=4)
        if each.best:
            axes.plot(*each.best, color=colour, marker="*", markersize=13, markeredgecolor="black")
    axes.grid(alpha=0.3)
    # matplotlib drops labels that begin with an underscore, and reads dollars as a formula.
    legend = axes.legend(handles, [f" {each.label}" for each in curves], fontsize="small")
    for label in legend.get_texts():
        label.set_parse_math(False)
    try:
        figure.savefig(file)
    except (OSError, ValueError) as error:  # ValueError: unknown file extension
        raise LoradeckError(f"cannot write {file}: {error}", hint="Give a .png or .svg file.") from error
    print(printable(f"{file}: {', '.join(each.label for each in curves[:5])}{' …' if len(curves) > 5 else ''}"))
