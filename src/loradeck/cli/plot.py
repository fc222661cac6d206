"""`loradeck plot`: runs as curves, in the terminal or as a picture. Reads metrics; imports no torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from loradeck.cli.display.curves import Curve, Metric
from loradeck.cli.display.text import shown
from loradeck.errors import ConfigError, LoradeckError

NAMES: dict[Metric, str] = {
    "loss": "loss (nats)",
    "validation": "validation loss (nats)",
    "learning_rate": "learning rate",
    "tokens_per_second": "tokens per second",
}
ABOUT = 5  # rows that the chart's axis, its title and the prompt take


def plot(*runs: Path, output: Annotated[Path | None, Parameter(alias="-o")] = None, metric: Metric = "loss") -> None:
    """Plot runs, a curve for each of their jobs.

    A loss is smoothed; the validation losses are marked along it, and the best
    of them with a star. Several runs are laid over each other.

    Args:
        runs: Folders that train wrote, or their metrics.jsonl.
        output: A picture to write, as plot.png or plot.svg, in place of the terminal.
        metric: What is plotted.
    """
    from loradeck.cli.display.curves import curves
    from loradeck.train.history import read_history

    if not runs:
        raise ConfigError("there is no run to plot", hint="Name the folder of one, or of several.")
    found = curves(dict(zip(_names(runs), map(read_history, runs), strict=True)), metric)
    if not found:
        raise LoradeckError(
            f"{', '.join(map(str, runs))}: nothing is told of the {NAMES[metric].partition(' (')[0]}",
            hint="The first step or evaluation is still to come, or a job has no validation examples.",
        )
    if output:
        _picture(found, metric, output)
        return
    from rich.console import Console

    from loradeck.cli.display.chart import chart

    console = Console(highlight=False)
    height = max(8, min(24, console.height - len(found) - ABOUT))
    colour = console.is_terminal and console.color_system is not None
    console.print(NAMES[metric])
    console.print(chart(found, console.width, height, colour=colour), soft_wrap=True, end="")


def _names(runs: Sequence[Path]) -> list[str]:
    """Return a name for each run: its folder's, or where two are called alike, the path that was given."""
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
            "a picture needs a package that is not installed",
            hint="Run pip install 'loradeck[plot]', or leave --output out to plot in the terminal.",
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
    # A label that begins with an underscore would be left out, and one with dollars would be read as a formula.
    legend = axes.legend(handles, [f" {each.label}" for each in curves], fontsize="small")
    for label in legend.get_texts():
        label.set_parse_math(False)
    try:
        figure.savefig(file)
    except (OSError, ValueError) as error:  # ValueError: no format has this ending
        raise LoradeckError(f"{file} cannot be written: {error}", hint="Name a .png or .svg file.") from error
    print(shown(f"{file}: {', '.join(each.label for each in curves[:5])}{' …' if len(curves) > 5 else ''}"))
