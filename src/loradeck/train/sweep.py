"""Try many settings in one run, by successive halving (Jamieson and Talwalkar, arXiv:1502.07943).

After 1/2ᵏ of the steps that follow the warm-up the worse half of the trials stops, after twice as many the worse half
of the rest, until the last one runs to its end. What counts is the validation loss, as a mean over the last
evaluations. All trials read the same examples in the same order, so only their settings differ.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from statistics import mean

from loradeck.errors import ConfigError
from loradeck.train.recipe import JobRecipe
from loradeck.train.trainer import Trainer

HELD_OUT = 0.1  # share of a dataset without validation examples
SMOOTHED = 3  # evaluations that a trial is judged by


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


def rungs(steps: int, warmup: int, count: int) -> set[int]:
    """Return the steps (rungs) of `steps` after which half of the remaining of `count` trials stops.

    They halve the steps after the warm-up: until then a trial with a larger rate is ahead only for being further.
    """
    rounds = (count - 1).bit_length()
    return {warmup + max(2**n, (steps - warmup) * 2**n // 2**rounds) for n in range(rounds)}


def smoothed(losses: Mapping[int, float], warmup: int) -> float:
    """Return the mean of the last evaluations (step -> loss), of those after the warm-up."""
    return mean([losses[step] for step in sorted(losses) if step > warmup][-SMOOTHED:])


def worse_half(losses: Mapping[str, float]) -> dict[str, str]:
    """Return the trials that stop, of these with their losses, each with the reason."""
    ranked = sorted(losses, key=lambda name: losses[name])
    keep = -(-len(ranked) // 2)
    return {
        name: f"validation loss {losses[name]:.4f}; the better half, up to {losses[ranked[keep - 1]]:.4f}, continues"
        for name in ranked[keep:]
    }


def halve(trainer: Trainer) -> None:
    """Stop the worse half of the running trials, if this pass is a rung."""
    schedules = [job.schedule for job in trainer.jobs.values()]
    warmup = max(schedule.warmup for schedule in schedules)
    if trainer.passes not in rungs(max(schedule.steps for schedule in schedules), warmup, len(schedules)):
        return
    trainer.evaluate([job for job in trainer.running if job.progress.step not in job.progress.validation])
    losses = {job.name: smoothed(job.progress.validation, warmup) for job in trainer.running}
    for name, why in worse_half(losses).items():
        trainer.stop(name, why)


def best(trainer: Trainer) -> str | None:
    """Return the trial with the lowest validation loss, if any has one."""
    losses = {n: job.progress.best_loss for n, job in trainer.jobs.items() if job.progress.best_loss is not None}
    return min(losses, key=lambda name: losses[name], default=None)
