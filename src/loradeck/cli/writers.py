"""A run's events, for the dashboards of others: TensorBoard and trackio. Knows their calls; both are extras."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Literal, TypeAlias

from loradeck.errors import LoradeckError
from loradeck.train.events import AnyEvent, Evaluation, Listener, Sample, Step
from loradeck.train.history import tokens_per_second

Kind: TypeAlias = Literal["tensorboard", "trackio"]
PROJECT = "loradeck"  # under which trackio lists the runs

Numbers: TypeAlias = Callable[[dict[str, float], int], None]
Words: TypeAlias = Callable[[str, str, int], None]


@contextmanager
def metric_writer(kind: Kind, folder: Path) -> Iterator[Listener]:
    """Yield what a run's events are told to, so that a dashboard shows them.

    Of each job, by step: NAME/loss, NAME/learning_rate, NAME/grad_norm, NAME/tokens_per_second (from the second step),
    NAME/validation_loss, DPO's accuracies, and the samples as text under NAME/sample.

    TensorBoard's files are written into `folder` (`tensorboard --logdir FOLDER`). trackio keeps its own, on this
    machine unless its own settings say otherwise, and lists the run by the folder's name (`trackio show`); a run that
    is resumed is listed again.

    Raises:
        LoradeckError: the package is not installed; says how to install it.
    """
    with (_tensorboard if kind == "tensorboard" else _trackio)(folder) as (numbers, words):
        before: dict[str, Step] = {}

        def hear(event: AnyEvent) -> None:
            if isinstance(event, Sample):
                words(f"{event.job}/sample", _markdown(event), event.step)
            elif found := _numbers(event, before.get(event.job)):
                numbers({f"{event.job}/{name}": value for name, value in found.items()}, event.step)
            if isinstance(event, Step):
                before[event.job] = event

        yield hear


def _numbers(event: AnyEvent, before: Step | None) -> dict[str, float]:
    found: dict[str, float | None] = {}
    if isinstance(event, Step):
        found = {name: getattr(event, name) for name in ("loss", "accuracy", "learning_rate", "grad_norm")}
        found["tokens_per_second"] = tokens_per_second((before, event)) if before else None
    elif isinstance(event, Evaluation):
        found = {"validation_loss": event.loss, "validation_accuracy": event.accuracy}
    return {name: value for name, value in found.items() if value is not None}


def _markdown(sample: Sample) -> str:
    """Lay out a sample; indented lines are code, in which a stranger's text can form no link and no image."""
    parts = {"prompt": sample.prompt, "expected": sample.expected, "answer": sample.answer}
    return "\n\n".join(
        f"{name}:\n\n" + "\n".join("    " + line for line in text.splitlines()) for name, text in parts.items()
    )


@contextmanager
def _tensorboard(folder: Path) -> Iterator[tuple[Numbers, Words]]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise _missing("tensorboard") from error
    with SummaryWriter(str(folder)) as writer:

        def numbers(values: dict[str, float], step: int) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        yield numbers, writer.add_text


@contextmanager
def _trackio(folder: Path) -> Iterator[tuple[Numbers, Words]]:
    try:
        trackio = import_module("trackio")  # is not there where the types are checked
    except ModuleNotFoundError as error:
        raise _missing("trackio") from error
    run = trackio.init(project=PROJECT, name=folder.resolve().name, embed=False)
    try:
        yield run.log, lambda name, text, step: run.log({name: trackio.Markdown(text)}, step)
    finally:
        trackio.finish()


def _missing(extra: str) -> LoradeckError:
    return LoradeckError(
        f"writing metrics for {extra} needs a package that is not installed",
        hint=f"Run pip install 'loradeck[{extra}]'.",
    )
