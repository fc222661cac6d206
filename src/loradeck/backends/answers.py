"""What a place has answered: good for a few seconds, and for longer while it does not answer again."""

import logging
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Generic, TypeVar

from loradeck.errors import LoradeckError

REFRESH = 5.0  # seconds for which an answer is good
PATIENCE = 1.0  # seconds to wait for a new answer where there is an old one
AT_ONCE = 8  # questions for whose new answers nobody waits any more
MOST = 1 << 14  # answers remembered

K = TypeVar("K")
V = TypeVar("V")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer(Generic[V]):
    """An answer, and until when it is good."""

    value: V
    until: float


@dataclass(frozen=True)
class Refresh:
    """A thread that asks again, and until when its answer is waited for."""

    thread: threading.Thread
    until: float


class Answers(Generic[K, V]):
    """Answers by question. Any thread may ask."""

    def __init__(self, ask: Callable[[K], V], waiting: Callable[[], AbstractContextManager[object]]) -> None:
        """`ask` asks the place, which may take long; a caller who has to wait for it does so in `waiting()`."""
        self._ask, self._waiting = ask, waiting
        self._lock = threading.Lock()
        self._answers: dict[K, Answer[V]] = {}
        self._asking: dict[K, Refresh] = {}  # after a fork, no thread is alive

    def get(self, question: K) -> V:
        """Return the answer to a question: a new one if it comes soon, else the one before.

        Raises:
            LoradeckError: there is no answer before, and the place refuses or does not answer.
        """
        with self._lock:
            before = self._answers.get(question)
            if before is not None and time.monotonic() < before.until:
                return before.value
            refresh = None if before is None else self._refreshing(question, before)
        if before is None:
            return self.ask(question)
        if refresh is not None:  # nobody waits for long, however many ask while the place is slow
            refresh.thread.join(max(0.0, refresh.until - time.monotonic()))
        with self._lock:
            return self._answers.get(question, before).value

    def ask(self, question: K) -> V:
        """Return a new answer.

        Raises:
            LoradeckError: the place refuses, or does not answer.
        """
        with self._lock:
            before = self._answers.get(question)
        with self._waiting():
            value = self._ask(question)
        self._remember(question, before, value)
        return value

    def forget(self, question: K) -> None:
        """Ask again when the question comes next."""
        with self._lock:
            self._answers.pop(question, None)

    def _refreshing(self, question: K, before: Answer[V]) -> Refresh | None:
        """Return what asks again; None if too many questions wait for new answers."""
        self._asking = {question: each for question, each in self._asking.items() if each.thread.is_alive()}
        if question not in self._asking and len(self._asking) < AT_ONCE:
            thread = threading.Thread(target=self._refresh, args=(question, before), daemon=True)
            self._asking[question] = Refresh(thread, time.monotonic() + PATIENCE)
            thread.start()
        return self._asking.get(question)

    def _refresh(self, question: K, before: Answer[V]) -> None:
        try:
            value = self._ask(question)
        except LoradeckError as error:
            log.warning("%(error)s; until it answers, its last answer is used", {"error": error.message})
            value = before.value
        self._remember(question, before, value)

    def _remember(self, question: K, before: Answer[V] | None, value: V) -> None:
        with self._lock:
            if self._answers.get(question) is not before:  # forgotten meanwhile: this answer may be too old
                return
            self._answers.pop(question, None)
            self._answers[question] = Answer(value, time.monotonic() + REFRESH)
            while len(self._answers) > MOST:
                self._answers.pop(next(iter(self._answers)))
