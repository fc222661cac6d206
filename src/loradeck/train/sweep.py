"""Many settings tried in one pass, the worse half stopped again and again. Knows validation losses; knows no tensors.

Successive halving (Jamieson and Talwalkar, arXiv:1502.07943): after 1/2ᵏ of the steps the better half goes on, then
after twice as many the better half of these, until the last runs to its end. All trials read the same examples in the
same order, so they differ in their settings alone.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

from loradeck.errors import ConfigError
from loradeck.train.events import AnyEvent, Evaluation
from loradeck.train.recipe import JobRecipe
from loradeck.train.trainer import Trainer

HELD_OUT = 0.1  # of a dataset without validation examples


def trials(job: JobRecipe, rates: Sequence[float], ranks: Sequence[int]) -> tuple[JobRecipe, ...]:
    """Return a job for each learning rate at each rank, named after them; an empty list leaves the job's own.

    Raises:
        ConfigError: they are fewer than two, or not all different.
    """
    pairs = [*product(rates or [None], ranks or [None])]
    if len(set(pairs)) < max(2, len(pairs)):
        raise ConfigError(
            "a sweep needs at least two different trials", hint="Give several: --lr 1e-4,3e-4 --r 4,16, or one of them."
        )
    return tuple(_trial(job, rate, r) for rate, r in pairs)


def _trial(job: JobRecipe, rate: float | None, r: int | None) -> JobRecipe:
    lora = job.lora if r is None else replace(job.lora, r=r)
    train = job.train if rate is None else replace(job.train, learning_rate=rate)
    parts = {"lr": rate, "r": r}
    name = "-".join(f"{key}{value:g}" for key, value in parts.items() if value is not None)
    return replace(job, name=name, lora=lora, train=train)


def rungs(steps: int, count: int) -> set[int]:
    """Return the steps of so many after which half of `count` trials goes, until one is left."""
    rounds = (count - 1).bit_length()
    return {max(1, steps // 2**rounds) * 2**n for n in range(rounds)}


class Halving:
    """Hears of evaluations, and after a pass stops the trials that are behind."""

    def __init__(self) -> None:
        self._latest: dict[str, Evaluation] = {}

    def hear(self, event: AnyEvent) -> None:
        """Take note of a validation loss."""
        if isinstance(event, Evaluation):
            self._latest[event.job] = event

    def __call__(self, trainer: Trainer) -> None:
        """Stop the worse half of the trials that run, where it is time."""
        steps = max(job.schedule.steps for job in trainer.jobs.values())
        if trainer.passes not in rungs(steps, len(trainer.jobs)):
            return
        trainer.evaluate([job for job in trainer.running if not job.due])
        losses = {job.name: self._latest[job.name].loss for job in trainer.running}
        ranked = sorted(losses, key=lambda name: losses[name])
        keep = -(-len(ranked) // 2)
        for name in ranked[keep:]:
            trainer.stop(
                name,
                f"validation loss {losses[name]:.4f}; the better half, up to {losses[ranked[keep - 1]]:.4f}, goes on",
            )


def best(trainer: Trainer) -> str | None:
    """Return the trial with the lowest validation loss, if any has one."""
    losses = {name: job.progress.best_loss for name, job in trainer.jobs.items()}
    found = {name: loss for name, loss in losses.items() if loss is not None}
    return min(found, key=lambda name: found[name], default=None)
