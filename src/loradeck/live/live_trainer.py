"""Training in the thread of an engine, in turns with its steps: many jobs, one pass of one of them at a time.

Jobs share the base and its thread, and nothing else: no batch, so a job's bits do not depend on the others; and one
that fails is known.
"""

import logging
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from contextvars import Context
from dataclasses import dataclass
from functools import partial
from threading import Event, Lock
from typing import Any, TypeAlias, TypeVar

import torch

from loradeck.base.pauses import pauses
from loradeck.errors import BusyError, ConfigError, Interruption
from loradeck.live.config import LiveConfig
from loradeck.live.turns import Turns
from loradeck.lora.bank import Bank
from loradeck.serve.request_engine import RequestEngine

T = TypeVar("T")
Passes: TypeAlias = Generator[object, None, None]
"""A job: each `next` takes one pass."""
End: TypeAlias = Callable[[BaseException | None], None]
"""What a job's end is told to: None if it ended by itself, Interruption if it was to end, else what it failed of."""

log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class _Job:
    name: str
    passes: Passes
    then: End
    leaves: bool = False


class LiveTrainer:
    """Jobs that train on an engine's base in the engine's thread. Any thread may call its methods.

    The base's modules, and the bank on them, belong to the engine's thread: what uses them belongs into a job's passes,
    or into a `call`.
    """

    def __init__(self, engine: RequestEngine[Any, Any], config: LiveConfig | None = None) -> None:
        """Begin without jobs, as the engine's background.

        Raises:
            BusyError: the engine is shutting down.
            ConfigError: it has a background.
            LoradeckError: the base's model has a bank already.
        """
        self.config = config or LiveConfig()
        self.base, self.bank = engine.base, Bank(engine.base.model)
        self._engine = engine
        self._turns = Turns(self.config.train_share, self.config.train_slice / 1000)
        self._jobs: deque[_Job] = deque()
        """In the order of their turns."""
        self._calls: deque[Callable[[], object]] = deque()
        self._current: _Job | None = None
        self._ended = False
        self._done = Event()
        self._lock = Lock()
        # Of its own, so that a GPU computes steps beside a pass: its kernels wait in order only for each other.
        cuda = self.base.model.device.type == "cuda"
        self._stream = torch.cuda.Stream(self.base.model.device) if cuda else None
        engine.attach(self)

    def join(self, name: str, passes: Passes, then: End) -> None:
        """Add a job. Each `next(passes)` is to take one pass, in the engine's thread, which then serves or goes on.

        When the job is to end, Interruption is raised where `passes` yields, or within a pass, whose gradients are then
        to be dropped. `then` is called once, in the engine's thread, when `passes` has ended.

        Raises:
            ConfigError: a job of this name has not ended.
            BusyError: the engine is shutting down.
        """
        with self._lock:
            self._check_open()
            if any(job.name == name for job in self._jobs):
                raise ConfigError(f"{name!r} is training already")
            self._jobs.append(_Job(name, passes, then))
        self._engine.wake()

    def leave(self, name: str) -> None:
        """Interrupt a job: it ends within a piece of a pass. Do nothing if there is none of this name."""
        with self._lock:
            for job in self._jobs:
                job.leaves |= job.name == name
        self._engine.wake()

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Call a function in the engine's thread, between two passes.

        Raises:
            BusyError: the engine is shutting down.
        """
        future: Future[T] = Future()

        def answer() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except BaseException as error:
                    future.set_exception(error)

        with self._lock:
            self._check_open()
            self._calls.append(answer)
        self._engine.wake()
        return future

    def _check_open(self) -> None:
        if self._ended:
            raise BusyError("the engine is shutting down", retry_after=1)

    def close(self) -> None:
        """Interrupt all jobs, within a piece of a pass, and wait for their ends; the engine goes on without them."""
        self._ended = True
        self._engine.wake()
        self._done.wait()
        self._engine.detach(self)

    # ---- in the engine's thread

    def work(self, serve: Callable[[], bool]) -> bool:
        """Do what was called for, and take one pass of the job whose turn it is; `serve` computes a step."""
        if self._ended:
            self.end()
        if not (self._calls or self._jobs):
            return False
        serve = partial(self._serve, serve, _current_stream(self._stream))
        with self._turns.turn(), _on(self._stream), pauses(self.base.model, lambda: self._pause(serve)):
            while self._calls:
                self._calls.popleft()()
            if self._jobs:
                self._pass(self._jobs[0])
        return True

    def end(self) -> None:
        """Interrupt all jobs, and take the bank off the base."""
        with self._lock:
            self._ended = True
        while self._jobs:
            self._pass(self._jobs[0])
        while self._calls:
            self._calls.popleft()()
        self.bank.detach()
        self._done.set()

    def _pause(self, serve: Callable[[], bool]) -> None:
        if self._ended or (self._current is not None and self._current.leaves):
            raise Interruption
        self._turns.pause(serve)

    def _serve(self, serve: Callable[[], bool], stream: torch.cuda.Stream | None) -> bool:
        """Compute a step that sees nothing of the pass it interrupts: no route, no packed lengths, no autograd mode."""
        with torch.enable_grad(), _on(stream):
            return Context().run(serve)

    def _pass(self, job: _Job) -> None:
        """Take a pass of a job, or end it; the next pass is another one's."""
        error: BaseException | None = None
        self._current = job
        try:
            if self._ended or job.leaves:
                job.passes.throw(Interruption())
            else:
                next(job.passes)
            with self._lock:
                self._jobs.rotate(-1)
            return
        except StopIteration:
            pass
        except Interruption as interruption:
            error = interruption
        except Exception as failure:
            log.exception("training %s failed", job.name)
            error = failure
        finally:
            self._current = None
        with self._lock:
            self._jobs.remove(job)
        try:
            job.then(error and error.with_traceback(None))  # whose frames hold the pass's tensors
        except Exception:
            log.exception("what follows the end of %s failed", job.name)


def _current_stream(stream: torch.cuda.Stream | None) -> torch.cuda.Stream | None:
    return stream and torch.cuda.current_stream(stream.device)


def _on(stream: torch.cuda.Stream | None) -> AbstractContextManager[object]:
    return nullcontext() if stream is None else torch.cuda.stream(stream)
