import math

import msgspec
import pytest

from loradeck.cli.display.curves import curve, curves, smoothed
from loradeck.train.events import Evaluation, Step
from loradeck.train.history import JobHistory


def step(number: int, loss: float) -> Step:
    return Step(
        job="poet",
        step=number,
        seconds=2.0 * number,
        took=2.0,
        steps=9,
        loss=loss,
        learning_rate=0.1 * number,
        grad_norm=1.0,
        tokens=100 * number,
        supervised=10,
        memory=1,
    )


def evaluation(number: int, loss: float, *, best: bool) -> Evaluation:
    return Evaluation(job="poet", step=number, seconds=1.0, loss=loss, tokens=5, best=best)


TRACK = JobHistory([step(1, 4.0), step(2, 2.0)], [evaluation(1, 3.0, best=True), evaluation(2, 3.5, best=False)])


def test_a_loss_has_its_validation_marked() -> None:
    loss = curve("poet", TRACK, "loss")
    assert loss.raw == [(1, 4.0), (2, 2.0)]
    assert loss.marks == [(1, 3.0), (2, 3.5)]
    assert loss.best == (1, 3.0)


def test_each_metric_has_its_own_values() -> None:
    assert curve("poet", TRACK, "validation").smooth == [(1, 3.0), (2, 3.5)]
    rate = curve("poet", TRACK, "learning_rate")
    assert (rate.smooth, rate.marks, rate.best) == ([(1, 0.1), (2, 0.2)], [], None)
    assert curve("poet", TRACK, "tokens_per_second").raw == [(2, 50.0)]


def test_values_that_are_not_finite_are_left_out() -> None:
    broken = JobHistory([step(1, 4.0), step(2, math.nan), msgspec.structs.replace(step(3, 2.0), took=0.0)])
    assert curve("poet", broken, "loss").raw == [(1, 4.0), (3, 2.0)]
    assert curve("poet", broken, "tokens_per_second").raw == [(2, 50.0)]


def test_a_smoothed_line_has_no_bias_and_less_noise() -> None:
    assert smoothed([(at, 5.0) for at in range(99)]) == [(at, pytest.approx(5.0)) for at in range(99)]
    noisy = [(at, float(at % 2)) for at in range(1000)]
    assert all(abs(value - 0.5) < 0.05 for _, value in smoothed(noisy)[200:])
    assert smoothed([(1, 4.0), (2, 2.0)]) == [(1, 4.0), (2, 2.0)]  # a short run is shown as it is


def test_curves_are_named_after_run_and_job() -> None:
    runs = {"a": {"poet": TRACK, "judge": JobHistory()}, "out/poet": {"poet": TRACK}}
    assert [each.label for each in curves(runs, "loss")] == ["a/poet", "poet"]
