"""Answers of a place: new ones within seconds, old ones while it does not answer, and never a long wait for a new one."""

import logging
import threading
from collections.abc import Iterator
from contextlib import nullcontext

import pytest

from loradeck.backends import answers as module
from loradeck.backends.answers import Answers
from loradeck.errors import StoreUnreachableError


class Clock:
    """The time that the answers see."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Place:
    """Counts its questions; it answers with their number, when its gate is open and it does not fail."""

    def __init__(self) -> None:
        self.questions: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.fails = False

    def ask(self, question: str) -> int:
        self.questions.append(question)
        number = len(self.questions)
        self.gate.wait()
        if self.fails:
            raise StoreUnreachableError("the place does not answer")
        return number


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)  # other threads of this process look at the real one
    return clock


@pytest.fixture
def place() -> Iterator[Place]:
    place = Place()
    yield place
    place.gate.set()


@pytest.fixture
def answers(place: Place) -> Answers[str, int]:
    return Answers(place.ask, nullcontext)


def test_an_answer_is_good_for_some_seconds(answers: Answers, place: Place, clock: Clock) -> None:
    assert [answers.get("a") for _ in range(3)] == [1, 1, 1]
    assert answers.get("b") == 2
    clock.now += module.REFRESH - 0.1
    assert answers.get("a") == 1
    clock.now += 0.2
    assert answers.get("a") == 3
    assert place.questions == ["a", "b", "a"]


def test_what_is_forgotten_is_asked_again(answers: Answers, place: Place, clock: Clock) -> None:
    answers.get("a")
    answers.forget("a")
    assert answers.get("a") == 2


def test_while_the_place_fails_its_last_answer_is_good(
    answers: Answers, place: Place, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    answers.get("a")
    place.fails = True
    for _ in range(3):
        clock.now += module.REFRESH + 1
        with caplog.at_level(logging.WARNING):
            assert [answers.get("a"), answers.get("a")] == [1, 1]
    assert len(place.questions) == 4  # no more often than before
    assert caplog.text.count("until it answers, its last answer is used") == 3
    with pytest.raises(StoreUnreachableError):
        answers.get("b")
    place.fails = False
    clock.now += module.REFRESH + 1
    assert answers.get("a") == 6


def test_only_one_asks_again_and_nobody_waits_once_it_is_late(answers: Answers, place: Place, clock: Clock) -> None:
    answers.get("a")
    place.gate.clear()  # from now on the place hangs
    clock.now += module.REFRESH + 1
    threads = [threading.Thread(target=answers.get, args=("a",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()  # each after PATIENCE at most
    clock.now += module.PATIENCE
    assert [answers.get("a") for _ in range(1000)] == [1] * 1000  # at once
    assert place.questions == ["a", "a"]
    refresh = answers._asking["a"].thread
    place.gate.set()
    refresh.join()
    assert answers.get("a") == 2


def test_questions_that_nobody_waits_for_are_few(answers: Answers, place: Place, clock: Clock, monkeypatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.0)
    names = [f"{number}" for number in range(50)]
    for name in names:
        answers.get(name)
    place.gate.clear()
    clock.now += module.REFRESH + 1
    assert [answers.get(name) for name in names] == [*range(1, 51)]
    assert len(place.questions) == 50 + module.AT_ONCE


def test_an_answer_from_before_a_change_is_not_kept(answers: Answers, place: Place, clock: Clock, monkeypatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.0)
    answers.get("a")
    place.gate.clear()
    clock.now += module.REFRESH + 1
    answers.get("a")  # asks again, in a thread
    refresh = answers._asking["a"].thread
    answers.forget("a")  # this process publishes something
    place.gate.set()
    refresh.join()
    assert answers.get("a") == 3


def test_not_all_answers_are_remembered(answers: Answers, place: Place, clock: Clock, monkeypatch) -> None:
    monkeypatch.setattr(module, "MOST", 2)
    for name in "abc":
        answers.get(name)
    assert answers.get("c") == 3
    assert answers.get("a") == 4
