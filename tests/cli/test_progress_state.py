import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loradeck.cli.display.progress_state import POINTS, RECENT, Curve, ProgressState
from loradeck.train.events import End, Evaluation, Sample, Step


def step(
    number: int, job: str = "poet", seconds: float | None = None, loss: float = 1.0, memory: int = 5, took: float = 1.0
) -> Step:
    return Step(
        job=job,
        step=number,
        seconds=float(number) if seconds is None else seconds,
        took=took,
        steps=100,
        loss=loss,
        learning_rate=1e-4,
        grad_norm=1.0,
        tokens=100 * number,
        supervised=10,
        memory=memory,
    )


def end(number: int, job: str = "poet") -> End:
    return End(job=job, step=number, seconds=float(number), reason="early stop", kept=1)


@given(st.integers(0, 5000))
def test_a_curve_stays_small_and_true(count: int) -> None:
    curve = Curve()
    for value in range(count):
        curve.add(value)
    assert len(curve.points) < POINTS
    assert len(curve.points) * curve.each + len(curve.pending) == count
    assert curve.points == [(at + 0.5) * curve.each - 0.5 for at in range(len(curve.points))]


def test_a_curve_is_drawn_from_its_lowest_to_its_highest() -> None:
    curve = Curve()
    assert curve.bars(10) == ""
    for value in (8.0, 1.0, 4.0):
        curve.add(value)
    assert curve.bars(10) == "█▁▄"
    assert curve.bars(1) == "▁"
    assert curve.bars(0) == ""
    for _ in range(5000):
        curve.add(1.0)
    assert len(curve.bars(10)) == 10


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_dropped(value: float) -> None:
    state = ProgressState()
    for number, loss in enumerate([3.0, value, 1.0], 1):
        job = state.update(step(number, loss=loss))
    assert job.curve.bars(9) == "█▁"
    assert job.step == step(3, loss=1.0)


def test_tokens_per_second_are_the_recent_ones() -> None:
    state = ProgressState()
    for number in range(1, 31):  # 10 s a step, as long as it warms up
        state.update(step(number, seconds=10.0 * number, took=10))
    for number in range(31, 31 + RECENT):
        job = state.update(step(number, seconds=300 + 0.5 * (number - 30), took=0.5))
    assert job.tokens_per_second == pytest.approx(200)
    assert job.left == pytest.approx(0.5 * (100 - 30 - RECENT))


def test_evaluations_count_for_the_time_left_but_not_for_tokens_per_second() -> None:
    state = ProgressState()
    state.update(step(1, seconds=1, took=1))
    state.update(Evaluation(job="poet", step=1, seconds=9.0, loss=2.0, tokens=7, best=True))
    job = state.update(step(2, seconds=10, took=1))
    assert (job.tokens_per_second, job.left) == (100.0, 9.0 * 98)


def test_tokens_per_second_are_unknown_before_the_second_step() -> None:
    job = ProgressState().update(step(1))
    assert (job.tokens_per_second, job.left, job.running) == (None, None, True)


def test_tokens_per_second_of_a_resumed_job_are_its_present_ones() -> None:
    state = ProgressState({"poet": 100})
    state.update(step(51, seconds=1000))
    job = state.update(step(52, seconds=1002, took=2))
    assert (job.tokens_per_second, job.left) == (50.0, 96.0)


def test_totals_are_of_running_jobs() -> None:
    state = ProgressState()
    for job in ("poet", "judge"):
        for number in (1, 2):
            state.update(step(number, job, memory=9 - number))
    assert state.tokens_per_second == 200
    state.update(end(3, "judge"))
    assert state.tokens_per_second == 100
    assert (state.memory, state.peak, state.seconds) == (7, 8, 3.0)


def test_running_jobs_come_first() -> None:
    state = ProgressState({"waits": 9, "ended": 9, "runs": 9})
    state.update(step(1, "ended"))
    state.update(end(1, "ended"))
    state.update(step(1, "runs"))
    assert [job.name for job in state.first()] == ["runs", "waits", "ended"]
    assert [job.name for job in state.first(1)] == ["runs"]


def test_evaluations_and_samples_belong_to_their_job() -> None:
    state = ProgressState()
    evaluation = Evaluation(job="poet", step=3, seconds=4.0, loss=2.0, tokens=7, best=True)
    state.update(evaluation)
    job = state.update(Sample(job="poet", step=3, seconds=5.0, prompt="a", expected="b", answer="c"))
    assert (job.validation, job.running, state.seconds) == (evaluation, False, 5.0)
