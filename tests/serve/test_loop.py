"""The engine's thread among others: what comes at the wrong moment, and what goes wrong within it."""

import asyncio
import copy
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from loradeck import AdapterStore, Base
from loradeck.errors import AdapterError, BusyError, ConfigError, RequestError
from loradeck.lora import safetensors_io
from loradeck.runner.request import Finish, Request
from loradeck.sampling import SamplingParams
from loradeck.serve.engine import Engine
from loradeck.serve.generation import Generation
from loradeck.serve.stop_strings import StopFilter

from .conftest import greedy, ids, prompts, until

SHORT = SamplingParams(max_tokens=6)
LONG = SamplingParams(max_tokens=200, ignore_eos=True)
Serve = Callable[..., Engine]


class Told:
    """An observer that keeps what it was told."""

    def __init__(self) -> None:
        self.admissions: list[Request] = []
        self.tokens: list[tuple[Request, float]] = []
        self.ends: list[tuple[Request, Finish]] = []

    def admitted(self, request: Request) -> None:
        self.admissions.append(request)

    def token(self, request: Request, since: float) -> None:
        self.tokens.append((request, since))

    def finished(self, request: Request, finish: Finish) -> None:
        self.ends.append((request, finish))


def refuse_room(engine: Engine, monkeypatch: pytest.MonkeyPatch, when: Callable[[Request], bool]) -> list[Request]:
    """Let the cache have no room once for a request, so that who came last gives way; the requests so refused."""
    cache, refused = engine._loop._cache, []
    reserve = cache.reserve

    def own(request: Request, tokens: int) -> bool:
        if not refused and when(request):
            refused.append(request)
            return False
        return reserve(request, tokens)

    monkeypatch.setattr(cache, "reserve", own)
    return refused


# ---- what comes at the wrong moment


def test_an_adapter_that_is_gone_when_its_request_comes_back_fails_it(
    serve: Serve, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had been admitted once, so that it was never told, and loading was tried until time ran out."""
    engine = serve()

    def when(request: Request) -> bool:
        if request.generated < 3:
            return False
        store.remove("a0")
        engine.adapter_cache.unload("a0")
        return True

    refuse_room(engine, monkeypatch, when)
    stream = engine.submit([5, 6], "a0", LONG)
    with pytest.raises(AdapterError):  # not the time-out's RequestError
        list(stream)
    assert engine.generate([[5]], "a1", SHORT)


@pytest.mark.slow
def test_unloading_by_hand_at_any_moment_does_no_harm(serve: Serve, base: Base, store: AdapterStore) -> None:
    engine = serve()
    expected = {name: greedy(base, store, [7, 8], name, 6) for name in ("a0", "a1")}
    ended = threading.Event()

    def unload() -> None:
        while not ended.is_set():
            engine.adapter_cache.unload("a0")
            engine.adapter_cache.unload("a1")
            time.sleep(0.001)

    thread = threading.Thread(target=unload)
    thread.start()
    try:
        for _ in range(5):
            found = engine.generate([[7, 8]] * 6, ["a0", "a1"] * 3, SHORT)
            assert [*map(ids, found)] == [expected["a0"], expected["a1"]] * 3
    finally:
        ended.set()
        thread.join()
    assert not engine.failed
    assert engine.adapter_cache.loads > 2


def test_a_request_that_is_given_up_while_its_adapter_loads(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, go = serve(), threading.Event()
    read = safetensors_io.read_body
    monkeypatch.setattr(safetensors_io, "read_body", lambda *own: (go.wait(120), read(*own)))
    stream = engine.submit([5], "a0", LONG)
    assert until(lambda: engine.stats.waiting == 1)
    assert ids(engine.generate([[5]], None, SHORT)[0])  # others go on
    stream.cancel()
    assert [*stream] == []
    assert stream.finish == "cancelled"
    assert engine.stats.waiting == 0
    go.set()
    assert until(lambda: engine.adapter_cache.loads == 1)
    assert [own.pins for own in engine.adapter_cache.residents()] == [0]


def test_a_blend_whose_one_member_cannot_be_loaded_fails(serve: Serve, base: Base, store: AdapterStore) -> None:
    engine = serve()
    blend = {"a0": 0.5, "a3": 0.5}
    file = store.find("a3").path / "adapter_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-4] + b"\xff\xff\xff\x7f")
    with pytest.raises(AdapterError, match="NaN or Inf"):
        engine.generate([[5, 6]], blend, SHORT)
    file.write_bytes(content)
    assert ids(engine.generate([[5, 6]], blend, SHORT)[0]) == greedy(base, store, [5, 6], blend, 6)


def test_two_versions_of_the_same_content_are_one_adapter(serve: Serve, store: AdapterStore) -> None:
    engine = serve()
    store.publish("a0", store.find("a0@1").path)
    found = engine.generate([[5, 6]] * 2, ["a0@1", "a0@2"], SHORT)
    assert ids(found[0]) == ids(found[1])
    assert engine.adapter_cache.loads == 1


def test_closing_while_an_adapter_loads(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, go = serve(), threading.Event()
    read = safetensors_io.read_body
    monkeypatch.setattr(safetensors_io, "read_body", lambda *own: (go.wait(120), read(*own)))
    stream = engine.submit([5], "a0", LONG)
    assert until(lambda: engine.stats.waiting == 1)
    closing = threading.Thread(target=engine.close)
    closing.start()
    assert [*stream] == []
    assert stream.finish == "cancelled"
    go.set()
    closing.join(120)
    assert not closing.is_alive()
    assert engine.adapter_cache.residents() == []
    with pytest.raises(BusyError):
        engine.adapter_cache.load("a1")
    with pytest.raises(BusyError):
        engine.submit([5])


def test_a_stop_between_two_looks_is_not_missed(serve: Serve) -> None:
    """The thread cleared the event after it had looked whether to stop, and then waited for ever."""
    loop = serve()._loop

    class Changed(threading.Event):
        def clear(self) -> None:
            loop._stopped = True  # stop() comes at this moment
            self.set()
            super().clear()

    waiting, loop._changed = loop._changed, Changed()
    waiting.set()
    loop.wake()
    loop._thread.join(120)
    assert not loop._thread.is_alive()


def test_closing_gives_the_memory_of_keys_and_values_back(serve: Serve) -> None:
    engine = serve()
    stream = engine.submit([5] * 64, None, LONG)
    next(stream)
    cache = engine._loop._cache
    assert cache.nbytes
    engine.close()
    assert cache.nbytes == 0
    engine.close()  # again


def test_a_request_is_alive_from_the_first_moment(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the queue and the streams it was neither, and draining went on without it."""
    engine = serve()
    add, seen = engine._loop._scheduler.add, []
    monkeypatch.setattr(
        engine._loop._scheduler, "add", lambda *own: (seen.append([s.request for s in engine._loop.live]), add(*own))
    )
    pop = engine._loop._arriving.popleft

    class Arriving(type(engine._loop._arriving)):  # type: ignore[misc]
        def popleft(self) -> Any:
            own = super().popleft()
            seen.append([stream.request for stream in engine._loop.live])
            return own

    assert pop
    engine._loop._arriving = Arriving()
    stream = engine.submit([5], None, SHORT)
    assert [*stream]
    assert len(seen) == 2
    assert all(stream.request in live for live in seen)


# ---- what goes wrong within


def test_an_engine_that_breaks_ends_all_and_takes_nothing_more(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = serve(max_rows=1)
    running = engine.submit([5], None, LONG)
    next(running)
    waiting = engine.submit([6], None, LONG)

    def broken(_: float) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(engine._loop._scheduler, "schedule", broken)
    for stream in (running, waiting):
        with pytest.raises(RequestError, match="the engine failed"):
            list(stream)
    assert until(lambda: engine.failed)
    assert "ZeroDivisionError" in caplog.text
    with pytest.raises(BusyError):
        engine.submit([7])
    engine.drain(1)


def test_a_request_that_comes_as_the_engine_breaks_ends(
    serve: Serve, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was taken a moment before, and nobody would ever have told its reader."""
    engine = serve()
    monkeypatch.setattr(engine._loop._scheduler, "schedule", lambda _: 1 / 0)
    first = engine.submit([5])
    with pytest.raises(RequestError):
        next(first)
    engine._loop._thread.join(120)
    late = Generation(Request([5], SHORT), StopFilter(base.tokenizer), lambda: None)
    engine._loop.add([(late, {})])
    assert until(lambda: late.finish is not None)
    with pytest.raises(RequestError, match="the engine failed"):
        next(late)
    assert engine._loop.live == []


def test_the_prompts_of_one_call_begin_together(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long each takes to be submitted: the first had ended before the last began, on a busy machine."""
    engine = serve()
    batches: list[int] = []
    run, check = engine._runner.run, engine._check

    def counted_run(batch: Any, cache: Any) -> Any:
        batches.append(len(batch))
        return run(batch, cache)

    def slow_check(*arguments: Any) -> None:
        time.sleep(0.05)
        check(*arguments)

    monkeypatch.setattr(engine._runner, "run", counted_run)
    monkeypatch.setattr(engine, "_check", slow_check)
    engine.generate([[5], [6], [7]], None, SHORT)
    assert batches[0] == 3


def test_stop_tokens_that_the_base_does_not_know(serve: Serve, base: Base) -> None:
    with pytest.raises(ConfigError, match="unknown token id 9999"):
        serve().submit([5], None, SamplingParams(stop_token_ids=frozenset({9999})))
    tokenizer = copy.deepcopy(base.tokenizer)  # other tests share it
    tokenizer.add_special_tokens({"additional_special_tokens": ["<one>", "<two>"]})
    base.model.generation_config.eos_token_id = [2, 999]  # the tokenizer has more tokens than the model
    with Engine(replace(base, tokenizer=tokenizer)) as engine:
        assert len(engine.generate([[5, 6]], None, SamplingParams(max_tokens=5, min_tokens=5))[0]) == 5


# ---- what observers are told


def test_an_observer_is_told_of_every_step(serve: Serve) -> None:
    told = Told()
    engine = serve(told)
    streams = [engine.submit(prompt, name, SHORT) for prompt, name in zip(prompts(4), ["a0", None] * 2, strict=True)]
    for stream in streams:
        assert [*stream]
    gone = engine.submit([5], None, LONG)
    next(gone)
    gone.cancel()
    list(gone)
    assert sorted(own.id for own in told.admissions) == sorted(stream.request.id for stream in [*streams, gone])
    assert {own.id: finish for own, finish in told.ends} == {
        **{stream.request.id: stream.finish for stream in streams}, gone.request.id: "cancelled",
    }  # fmt: skip
    for stream in streams:
        since = [own for request, own in told.tokens if request is stream.request]
        assert len(since) == stream.request.generated
        assert sum(since) == pytest.approx(stream.request.last_token - stream.request.arrived)


def test_who_gives_way_within_its_prompt_is_admitted_once(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told()
    engine = serve(told, max_step_tokens=8)
    refused = refuse_room(engine, monkeypatch, lambda request: request.computed == 56)
    stream = engine.submit([7] * 64, None, SHORT)
    assert len([*stream]) == 6
    assert refused == [stream.request]
    assert told.admissions == [stream.request]
    assert stream.request.cached == 0


# ---- readers


def test_threads_and_several_loops_at_once(serve: Serve, base: Base, store: AdapterStore) -> None:
    engine = serve()
    expected = {name: greedy(base, store, [5, 6], name, 6) for name in ("a0", "a1", None)}
    found: dict[str, list[list[int]]] = {}

    async def read(name: str | None) -> list[int]:
        return [token.id async for token in engine.stream([5, 6], name, SHORT)]

    async def loop() -> list[list[int]]:
        return await asyncio.gather(*map(read, expected))

    def sync(label: str) -> None:
        found[label] = [[token.id for token in engine.stream([5, 6], name, SHORT)] for name in expected]

    works = [
        *(threading.Thread(target=sync, args=(f"thread {i}",)) for i in range(2)),
        *(threading.Thread(target=lambda i=i: found.update({f"loop {i}": asyncio.run(loop())})) for i in range(2)),
    ]
    for work in works:
        work.start()
    for work in works:
        work.join(120)
    assert {*found} == {"thread 0", "thread 1", "loop 0", "loop 1"}
    assert all(own == [*expected.values()] for own in found.values())


def test_an_asyncio_task_that_stops_reading_frees_its_row(serve: Serve) -> None:
    engine = serve(max_rows=1)

    async def main() -> None:
        stream = engine.stream([5], None, LONG)
        async for _ in stream:
            break
        stream.cancel()
        assert [token.id async for token in engine.stream([6], None, SHORT)]

    asyncio.run(main())
    assert until(lambda: engine.stats.running == 0)
