"""Successive halving: who is judged when, and by what."""

from collections.abc import Callable, Sequence

import pytest

from loradeck.base.load import Base
from loradeck.dataset.example import Example
from loradeck.lora.bank import Bank
from loradeck.lora.config import LoraConfig
from loradeck.train.config import TrainConfig
from loradeck.train.events import AnyEvent, End
from loradeck.train.sweep import best, halve, rungs, smoothed, worse_half
from loradeck.train.trainer import Trainer


@pytest.mark.parametrize("steps", [1, 2, 10, 28, 1000])
@pytest.mark.parametrize("warmup", [0, 1, 3, 10])
@pytest.mark.parametrize("count", [2, 3, 6, 16])
def test_nobody_is_judged_before_the_warm_up_is_over(steps: int, warmup: int, count: int) -> None:
    at = rungs(steps, warmup, count)
    assert min(at) > warmup
    assert len(at) == (count - 1).bit_length(), "one is left after the last"


def test_the_rungs_halve_what_follows_the_warm_up() -> None:
    assert sorted(rungs(28, 3, 6)) == [6, 9, 15]
    assert sorted(rungs(16, 0, 6)) == [2, 4, 8]


def survivors(curves: dict[str, Callable[[int], float]], steps: int, warmup: int, every: int) -> list[str]:
    """Return who is left in the end, of trials with these losses by step."""
    losses: dict[str, dict[int, float]] = {name: {} for name in curves}
    for step in range(1, steps + 1):
        for name in losses:
            if step % every == 0 or step in rungs(steps, warmup, len(curves)):
                losses[name][step] = curves[name](step)
        if step in rungs(steps, warmup, len(curves)):
            for name in worse_half({name: smoothed(each, warmup) for name, each in losses.items()}):
                del losses[name]
    return [*losses]


def test_the_favourite_of_the_warm_up_loses_in_the_end() -> None:
    """The largest rates are ahead while the rates rise, and diverge at their peak."""
    curves: dict[str, Callable[[int], float]] = {
        "hot": lambda step: 4 - step if step <= 3 else 1.0 + 2 * (step - 3),
        "hotter": lambda step: 4 - 1.1 * step if step <= 3 else 0.7 + 3 * (step - 3),
        "good": lambda step: 4 - 0.1 * step,
        "slow": lambda step: 4 - 0.05 * step,
    }
    assert {*sorted(curves, key=lambda name: curves[name](3))[:2]} == {"hot", "hotter"}
    assert survivors(curves, steps=12, warmup=3, every=2) == ["good"]


def test_one_lucky_evaluation_does_not_decide() -> None:
    """The losses are means over evaluations, without those of the warm-up."""
    lucky = {2: 0.0, 8: 2.0, 10: 2.0, 12: 0.9}
    steady = {2: 9.0, 8: 1.2, 10: 1.1, 12: 1.0}
    assert smoothed(lucky, warmup=3) == pytest.approx((2 + 2 + 0.9) / 3)
    assert smoothed(steady, warmup=3) == pytest.approx(1.1)
    assert [*worse_half({"lucky": smoothed(lucky, 3), "steady": smoothed(steady, 3)})] == ["lucky"]


@pytest.mark.usefixtures("one_thread")
def test_a_rate_that_is_too_large_loses_though_it_leads_the_warm_up(base: Base, examples: Sequence[Example]) -> None:
    bank, ends = Bank(base.model), list[AnyEvent]()
    trainer = Trainer(base, bank, on_event=ends.append)
    for rate in (1e-1, 3e-3):
        bank.add(f"{rate:g}", LoraConfig(r=4))
        config = TrainConfig(learning_rate=rate, max_steps=40, warmup_ratio=0.3, batch_size=4, eval_every=1)
        trainer.add(f"{rate:g}", examples, config, valid=examples)
    for _ in trainer:
        halve(trainer)
    losses = {name: job.progress.validation for name, job in trainer.jobs.items()}
    assert losses["0.1"][2] < losses["0.003"][2], "it leads while the rates rise"
    assert {event.job: event.reason for event in ends if isinstance(event, End)} == {
        "0.1": "stopped",
        "0.003": "finished",
    }
    assert best(trainer) == "0.003"
