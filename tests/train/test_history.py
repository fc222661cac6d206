from pathlib import Path

import pytest

from loradeck.errors import LoradeckError
from loradeck.train.events import AnyEvent, End, Evaluation, Sample, Step, encode
from loradeck.train.history import METRICS, read_history, tokens_per_second


def step(number: int, job: str = "poet", loss: float = 1.0, took: float = 1.0) -> Step:
    return Step(
        job=job,
        step=number,
        seconds=float(number),
        took=took,
        steps=9,
        loss=loss,
        learning_rate=1e-4,
        grad_norm=1.0,
        tokens=100 * number,
        supervised=10,
        memory=1,
    )


def evaluation(number: int, loss: float, best: bool = False) -> Evaluation:
    return Evaluation(job="poet", step=number, seconds=float(number), loss=loss, tokens=5, best=best)


def end(number: int) -> End:
    return End(job="poet", step=number, seconds=float(number), reason="interrupted", kept=number)


def sample(number: int) -> Sample:
    return Sample(job="poet", step=number, seconds=1.0, prompt="a", expected="b", answer="c")


def write(folder: Path, *events: AnyEvent, tail: bytes = b"") -> Path:
    (folder / METRICS).write_bytes(b"".join(map(encode, events)) + tail)
    return folder


def test_each_job_has_its_own_history(tmp_path: Path) -> None:
    events = [step(1), step(1, "judge"), step(2), evaluation(2, 0.5, best=True), evaluation(3, 0.6), sample(3), end(3)]
    jobs = read_history(write(tmp_path, *events))
    assert list(jobs) == ["poet", "judge"]
    assert jobs["poet"].steps == [events[0], events[2]]
    assert jobs["poet"].evaluations == [events[3], events[4]]
    assert jobs["poet"].best == events[3]
    assert jobs["poet"].end == events[6]
    assert (jobs["judge"].best, jobs["judge"].end) == (None, None)
    assert read_history(tmp_path / METRICS) == jobs


def test_a_resumed_run_counts_each_step_once(tmp_path: Path) -> None:
    first = [step(1), step(2), evaluation(2, 5.0), step(3, loss=7.0), evaluation(3, 7.0), step(4), end(4)]
    again = [step(3, loss=2.0), evaluation(3, 2.0, best=True), evaluation(3, 2.5, best=True)]
    job = read_history(write(tmp_path, *first, *again))["poet"]
    assert job.steps == [step(1), step(2), step(3, loss=2.0)]
    assert job.evaluations == [evaluation(2, 5.0), evaluation(3, 2.5, best=True)]
    assert job.end is None


@pytest.mark.parametrize("cut", range(1, len(encode(step(2)))))
def test_a_last_line_that_was_cut_short_is_ignored(tmp_path: Path, cut: int) -> None:
    line = encode(step(2))
    job = read_history(write(tmp_path, step(1), tail=line[:cut]))["poet"]
    assert job.steps == ([step(1), step(2)] if cut == len(line) - 1 else [step(1)])  # whole but for its end


@pytest.mark.parametrize(
    "bad", [b"{}", b"nonsense", b'{"event":"party","job":"x","step":1,"seconds":1}', b"\xff", b"[" * 100_000]
)
def test_every_invalid_line_is_named(tmp_path: Path, bad: bytes) -> None:
    tail = bad + b"\n" + encode(step(2)) + encode(step(3))[:30] + b"\n"
    with pytest.raises(LoradeckError) as caught:
        read_history(write(tmp_path, step(1), tail=tail))
    two, four = caught.value.problems
    assert two.startswith(f"{tmp_path / METRICS}:2: ")
    assert four.startswith(f"{tmp_path / METRICS}:4: ")


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoradeckError, match=r"metrics.jsonl cannot be read: No such file"):
        read_history(tmp_path)
    with pytest.raises(LoradeckError, match="has no events"):
        read_history(write(tmp_path))


def test_tokens_per_second_are_those_between_the_steps() -> None:
    assert tokens_per_second([step(2, took=10), step(3, took=1), step(6, took=7)]) == 50.0
    assert tokens_per_second([step(2), step(6, took=0)]) is None
    assert tokens_per_second([step(2)]) is None
