"""Try many settings in one run, by successive halving (Jamieson and Talwalkar, arXiv:1502.07943).

After 1/2ᵏ of the steps the worse half of the trials stops, after twice as many the worse half of the rest, until the
last one runs to its end. All trials read the same examples in the same order, so only their settings differ.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

from loradeck.errors import ConfigError
from loradeck.train.events import AnyEvent, Evaluation
from loradeck.train.recipe import JobRecipe
from loradeck.train.trainer import Trainer

HELD_OUT = 0.1  # share of a dataset without validation examples


def trials(job: JobRecipe, rates: Sequence[float], ranks: Sequence[int]) -> tuple[JobRecipe, ...]:
    """Return a job for each combination of learning rate and rank, named after it; an empty list keeps the job's.

    Raises:
        ConfigError: there are fewer than two trials, or two are equal.
    """
    pairs = [*product(rates or [None], ranks or [None])]
    if len(set(pairs)) < max(2, len(pairs)):
        raise ConfigError(
            "a sweep needs at least two different trials",
            hint="Give several learning rates, or ranks, or both.",
            cli="As in --lr 1e-4,3e-4 --r 4,16.",
        )
    return tuple(_trial(job, rate, r) for rate, r in pairs)


def _trial(job: JobRecipe, rate: float | None, r: int | None) -> JobRecipe:
    lora = job.lora if r is None else replace(job.lora, r=r)
    train = job.train if rate is None else replace(job.train, learning_rate=rate)
    settings = {"lr": rate, "r": r}
    name = "-".join(f"{key}{value:g}" for key, value in settings.items() if value is not None)
    return replace(job, name=name, lora=lora, train=train)


def rungs(steps: int, count: int) -> set[int]:
    """Return the steps (rungs) of `steps` after which half of the remaining of `count` trials stops."""
    rounds = (count - 1).bit_length()
    return {max(1, steps // 2**rounds) * 2**n for n in range(rounds)}


class Halving:
    """Stops the worse half of the trials at each rung. `on_event` listens to the run; the call follows each pass."""

    def __init__(self) -> None:
        self._latest: dict[str, Evaluation] = {}

    def on_event(self, event: AnyEvent) -> None:
        """Record a validation loss."""
        if isinstance(event, Evaluation):
            self._latest[event.job] = event

    def __call__(self, trainer: Trainer) -> None:
        """Stop the worse half of the running trials, if this pass is a rung."""
        steps = max(job.schedule.steps for job in trainer.jobs.values())
        if trainer.passes not in rungs(steps, len(trainer.jobs)):
            return
        trainer.evaluate([job for job in trainer.running if not job.evaluation_due])
        losses = {job.name: self._latest[job.name].loss for job in trainer.running}
        ranked = sorted(losses, key=lambda name: losses[name])
        keep = -(-len(ranked) // 2)
        for name in ranked[keep:]:
            trainer.stop(
                name,
                f"validation loss {losses[name]:.4f}; the better half, up to {losses[ranked[keep - 1]]:.4f}, continues",
            )


def best(trainer: Trainer) -> str | None:
    """Return the trial with the lowest validation loss, if any has one."""
    losses = {n: job.progress.best_loss for n, job in trainer.jobs.items() if job.progress.best_loss is not None}
    return min(losses, key=lambda name: losses[name], default=None)
