"""What an engine's thread does beside its requests: when, and what a failure of either does to the other."""

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from tests.classifiers import make as make_classifier
from transformers import PreTrainedTokenizerFast

from loradeck import Base
from loradeck.base.fingerprint import fingerprint
from loradeck.errors import BusyError, ConfigError, Interruption, RequestError
from loradeck.sampling import SamplingParams
from loradeck.serve.config import EngineConfig
from loradeck.serve.engine import Engine
from loradeck.serve.pooling_engine import PoolingEngine

from .conftest import greedy, ids, until

SHORT = SamplingParams(max_tokens=6, ignore_eos=True)
LONG = SamplingParams(max_tokens=200, ignore_eos=True)
WAIT = 120
Serve = Callable[[], bool]


class Work:
    """A background whose pieces of work are functions of `serve`; it keeps what `serve` returned."""

    def __init__(self) -> None:
        self.pieces: list[Callable[[Serve], object]] = []
        self.calls, self.depth, self.deepest = 0, 0, 0
        self.ended = threading.Event()
        self.threads: set[int] = set()

    def work(self, serve: Serve) -> bool:
        self.calls += 1
        self.depth += 1
        self.deepest = max(self.deepest, self.depth)
        self.threads.add(threading.get_ident())
        try:
            if not self.pieces:
                return False
            self.pieces.pop(0)(serve)
            return True
        finally:
            self.depth -= 1

    def end(self) -> None:
        self.ended.set()


@pytest.fixture
def engine(base: Base) -> Iterator[Engine]:
    with Engine(base, config=EngineConfig(max_rows=4, max_step_tokens=16)) as engine:
        yield engine


@pytest.fixture
def work(engine: Engine) -> Work:
    work = Work()
    engine.attach(work)
    return work


def serve_all(engine: Engine, done: threading.Event) -> Callable[[Serve], None]:
    """A piece of work in which requests that arrive meanwhile are served until an event comes."""

    def piece(serve: Serve) -> None:
        while not done.is_set():
            if not serve():
                engine._loop._changed.wait(WAIT)
                engine._loop._changed.clear()

    return piece


def test_steps_within_the_work_compute_what_steps_do(engine: Engine, work: Work, base: Base) -> None:
    done = threading.Event()
    work.pieces.append(serve_all(engine, done))
    engine.wake()
    streams = [engine.submit([5, 6, 7 + i], sampling=SHORT) for i in range(3)]
    answers = [ids(stream) for stream in streams]
    done.set()
    engine.wake()
    assert answers == [greedy(base, None, [5, 6, 7 + i], length=6) for i in range(3)]
    assert work.deepest == 1, "a step within the work did the work"
    assert len(work.threads) == 1


def test_without_work_and_requests_the_thread_sleeps(engine: Engine, work: Work) -> None:
    """It looks at the work once each time that it is woken, and no more."""
    assert until(lambda: work.calls >= 1)
    for _ in range(20):
        before = work.calls
        work.pieces.append(lambda _: None)
        engine.wake()
        assert until(lambda before=before: work.calls >= before + 2)  # the piece, and that there is no other
    assert work.calls <= 2 * 20 + 3
    ids(engine.submit([5, 6], sampling=SHORT))
    assert work.calls <= 2 * 20 + 3 + 20


def test_work_is_done_between_the_steps_of_a_stream(engine: Engine, work: Work) -> None:
    stream = engine.submit([5, 6], sampling=LONG)
    next(stream)
    done: list[int] = []
    work.pieces += [lambda _: done.append(1)] * 5
    assert until(lambda: len(done) == 5)
    stream.cancel()


def test_a_failure_of_the_work_ends_the_work_alone(engine: Engine, work: Work, base: Base) -> None:
    def fail(serve: Serve) -> None:
        raise ValueError("of the work")

    work.pieces.append(fail)
    engine.wake()
    assert work.ended.wait(WAIT)
    assert ids(engine.submit([5, 6], sampling=SHORT)) == greedy(base, None, [5, 6], length=6)
    assert not engine.failed
    engine.attach(Work())  # there is room for another


def test_a_failure_of_a_step_within_the_work_fails_the_engine(
    engine: Engine, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    raised: list[BaseException] = []

    def fail() -> list[object]:
        raise ValueError("of the engine")

    def piece(serve: Serve) -> None:
        monkeypatch.setattr(engine._loop, "_schedule", fail)
        stream = engine.submit([5, 6], sampling=SHORT)
        try:
            serve()
        except BaseException as error:
            raised.append(error)
            raise
        finally:
            assert stream.finish is None  # it ends with the engine, not within the work

    work.pieces.append(piece)
    engine.wake()
    assert work.ended.wait(WAIT)
    assert engine.failed
    assert [type(error) for error in raised] == [Interruption]
    with pytest.raises(BusyError):
        engine.attach(Work())


@pytest.mark.parametrize("swallows", [False, True])
def test_a_stop_interrupts_the_work(base: Base, swallows: bool) -> None:
    engine, work = Engine(base), Work()
    engine.attach(work)
    interruptions: list[int] = []
    begun = threading.Event()

    def piece(serve: Serve) -> None:
        try:
            while True:
                serve()
                begun.set()
        except Interruption:
            interruptions.append(1)
            if not swallows:
                raise

    work.pieces.append(piece)
    engine.wake()
    stream = engine.submit([5, 6], sampling=LONG)
    assert begun.wait(WAIT)
    engine.close()
    assert interruptions == [1]
    assert work.ended.is_set()
    assert stream.finish in ("cancelled", "length")
    with pytest.raises(BusyError):
        engine.attach(Work())


def test_draining_waits_for_requests_that_are_served_within_the_work(engine: Engine, work: Work) -> None:
    done = threading.Event()
    work.pieces.append(serve_all(engine, done))
    engine.wake()
    stream = engine.submit([5, 6], sampling=SHORT)
    engine.drain(WAIT)
    assert stream.finish == "length"
    done.set()
    engine.wake()


def test_an_engine_has_one_background(engine: Engine, work: Work) -> None:
    with pytest.raises(ConfigError, match="background"):
        engine.attach(Work())
    engine.detach(Work())  # not its own
    engine.detach(work)
    other = Work()
    engine.attach(other)
    assert until(lambda: other.calls > 0)
    assert not work.ended.is_set()


def test_an_engine_for_pooling_works_too(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_classifier("bert", "classify", 2, 1).eval().requires_grad_(False)
    base = Base(model, tiny_tokenizer, "tiny", "tiny", fingerprint(model), task="classify")
    rows = [[5, 9, 33, 7], [8, 2, 90]]
    with PoolingEngine(base) as engine:
        alone = [answer.result() for answer in engine.submit(rows)]
        work, done = Work(), threading.Event()
        work.pieces.append(serve_all(engine, done))  # type: ignore[arg-type]
        engine.attach(work)
        beside = [answer.result() for answer in engine.submit(rows)]
        done.set()
        engine.wake()
        assert all(map(torch.equal, alone, beside))


def test_a_failure_of_one_request_within_the_work_is_its_own(
    engine: Engine, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = engine._runner.run

    def fail(batch: list, cache: object) -> object:
        if any(scheduled.request.tokens[0] == 9 for scheduled in batch):
            raise ValueError("of a request")
        return run(batch, cache)

    monkeypatch.setattr(engine._runner, "run", fail)
    done = threading.Event()
    work.pieces.append(serve_all(engine, done))
    engine.wake()
    good, bad = engine.submit([5, 6], sampling=SHORT), engine.submit([9, 6], sampling=SHORT)
    assert len(ids(good)) == 6
    with pytest.raises(RequestError):
        ids(bad)
    done.set()
    engine.wake()
    assert not engine.failed
