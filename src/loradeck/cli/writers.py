"""Writers of a run's metrics for TensorBoard and trackio, which are extras."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Literal, TypeAlias

from loradeck.errors import LoradeckError
from loradeck.train.events import AnyEvent, Evaluation, Listener, Sample, Step
from loradeck.train.history import tokens_per_second

Kind: TypeAlias = Literal["tensorboard", "trackio"]
PROJECT = "loradeck"  # the project of the runs in trackio

WriteNumbers: TypeAlias = Callable[[dict[str, float], int], None]
WriteText: TypeAlias = Callable[[str, str, int], None]


@contextmanager
def metric_writer(kind: Kind, folder: Path) -> Iterator[Listener]:
    """Yield a listener that writes a run's events for a dashboard.

    For each job, by step: NAME/loss, NAME/learning_rate, NAME/grad_norm, NAME/tokens_per_second (from the second step),
    NAME/validation_loss, DPO's accuracies, and the samples as text under NAME/sample.

    TensorBoard's files go into `folder` (`tensorboard --logdir FOLDER`). trackio has its own storage, local by default,
    and lists the run under the folder's name (`trackio show`), a resumed one again.

    Raises:
        LoradeckError: the package is not installed.
    """
    with (_tensorboard if kind == "tensorboard" else _trackio)(folder) as (write_numbers, write_text):
        last_step: dict[str, Step] = {}

        def listen(event: AnyEvent) -> None:
            if isinstance(event, Sample):
                write_text(f"{event.job}/sample", _markdown(event), event.step)
            elif numbers := _numbers(event, last_step.get(event.job)):
                write_numbers({f"{event.job}/{name}": value for name, value in numbers.items()}, event.step)
            if isinstance(event, Step):
                last_step[event.job] = event

        yield listen


def _numbers(event: AnyEvent, before: Step | None) -> dict[str, float]:
    numbers: dict[str, float | None] = {}
    if isinstance(event, Step):
        numbers = {name: getattr(event, name) for name in ("loss", "accuracy", "margin", "learning_rate", "grad_norm")}
        numbers["tokens_per_second"] = tokens_per_second((before, event)) if before else None
    elif isinstance(event, Evaluation):
        numbers = {
            "validation_loss": event.loss,
            "validation_accuracy": event.accuracy,
            "validation_margin": event.margin,
        }
    return {name: value for name, value in numbers.items() if value is not None}


def _markdown(sample: Sample) -> str:
    """Return a sample as Markdown; its indented lines are code, so untrusted text cannot form links or images."""
    parts = {"prompt": sample.prompt, "expected": sample.expected, "answer": sample.answer}
    return "\n\n".join(
        f"{name}:\n\n" + "\n".join("    " + line for line in text.splitlines()) for name, text in parts.items()
    )


@contextmanager
def _tensorboard(folder: Path) -> Iterator[tuple[WriteNumbers, WriteText]]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise _missing("tensorboard") from error
    with SummaryWriter(str(folder)) as writer:

        def write_numbers(values: dict[str, float], step: int) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        yield write_numbers, writer.add_text


@contextmanager
def _trackio(folder: Path) -> Iterator[tuple[WriteNumbers, WriteText]]:
    try:
        trackio = import_module("trackio")  # not installed where types are checked
    except ModuleNotFoundError as error:
        raise _missing("trackio") from error
    run = trackio.init(project=PROJECT, name=folder.resolve().name, embed=False)
    try:
        yield run.log, lambda name, text, step: run.log({name: trackio.Markdown(text)}, step)
    finally:
        trackio.finish()


def _missing(extra: str) -> LoradeckError:
    return LoradeckError(
        f"the package {extra} is not installed",
        hint=f"Run pip install 'loradeck[{extra}]'.",
    )
