"""Who runs next: tokens, rows, memory for adapters and for keys and values. Plain Python, no model."""

from collections import Counter
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from loradeck.runner.request import Key, Request
from loradeck.sampling import SamplingParams
from loradeck.serve.config import EngineConfig
from loradeck.serve.scheduler import Scheduler


class Rows:
    """Room for a number of tokens."""

    def __init__(self, room: int = 10_000) -> None:
        self.room = room
        self.taken: dict[Request, int] = {}

    def reserve(self, request: Request, tokens: int) -> bool:
        others = sum(own for other, own in self.taken.items() if other is not request)
        if others + tokens > self.room:
            return False
        self.taken[request] = max(tokens, self.taken.get(request, 0))
        return True

    def release(self, request: Request) -> None:
        self.taken.pop(request, None)


class Adapters:
    """Room for a number of adapters; a load takes until `settle`."""

    def __init__(self, room: int = 100) -> None:
        self.room = room
        self.here: dict[str, int] = {}  # sha256 -> pins, the least recently used first
        self.coming: list[str] = []
        self.loads = 0

    def ready(self, key: Key) -> bool:
        return all(own in self.here for own, _ in key)

    def fetch(self, adapters: Mapping[str, Any], *, keep: Callable[[str], bool]) -> bool:
        missing = [name for name in adapters if name not in self.here and name not in self.coming]
        free = self.room - len(self.here) - len(self.coming)
        idle = [name for name, pins in self.here.items() if not pins and name not in adapters and not keep(name)]
        if free + len(idle) < len(missing):
            return False
        for own in idle[: max(0, len(missing) - free)]:
            del self.here[own]
        self.coming += missing
        self.loads += len(missing)
        return True

    def settle(self) -> None:
        self.here |= dict.fromkeys(self.coming, 0)
        self.coming = []

    def pin(self, key: Key) -> bool:
        if not self.ready(key):
            return False
        for own, _ in key:
            self.here[own] = self.here.pop(own) + 1
        return True

    def unpin(self, key: Key) -> None:
        for own, _ in key:
            self.here[own] -= 1


class World:
    """A scheduler, and what a step does to its requests."""

    def __init__(
        self, *, rows: int = 4, tokens: int = 16, room: int = 10_000, adapters: int = 100, **bounds: Any
    ) -> None:
        self.rows, self.adapters = Rows(room), Adapters(adapters)
        config = EngineConfig(max_rows=rows, max_step_tokens=tokens, **bounds)
        self.scheduler = Scheduler(config, self.rows, self.adapters)
        self.now = 0.0
        self.done: list[str] = []

    def ask(
        self, name: str, adapter: str = "", *, prompt: int = 3, answer: int = 4, tenant: str = "", weight: float = 1.0
    ) -> Request:
        key: Key = ((adapter, weight),) if adapter else ()
        sampling = SamplingParams(max_tokens=answer)
        request = Request([0] * prompt, sampling, key, name, tenant=tenant, arrived=self.now)
        self.scheduler.add(request, {adapter: SimpleNamespace()} if adapter else {})  # type: ignore[dict-item]
        return request

    def step(self, seconds: float = 0.01) -> dict[str, int]:
        """Compute one step, and return how many tokens of each request it had."""
        self.now += seconds
        batch = self.scheduler.schedule(self.now)
        told = {work.request.id: work.count for work in batch}
        assert len(told) == len(batch)
        assert all(self.adapters.ready(work.request.key) for work in batch)
        assert sum(told.values()) <= self.scheduler.config.max_step_tokens
        for work in batch:
            self.scheduler.advance(work.request, work.count)
        for work in batch:
            if not work.request.pending:
                work.request.tokens.append(0)
                if work.request.generated == work.request.sampling.max_tokens:
                    self.scheduler.end(work.request)
                    self.done.append(work.request.id)
        self.adapters.settle()
        return told

    def run(self, steps: int = 500) -> list[str]:
        for _ in range(steps):
            self.step()
        return self.done


def test_a_long_prompt_stalls_nobody() -> None:
    world = World(tokens=8)
    world.ask("short", answer=20)
    world.step()
    world.ask("long", prompt=50)
    steps = [world.step() for _ in range(8)]
    assert all(step["short"] == 1 for step in steps)
    assert [step.get("long") for step in steps] == [7] * 7 + [1]


def test_rows_are_bounded_and_filled() -> None:
    world = World(rows=2)
    for i in range(5):
        world.ask(str(i))
    assert len(world.step()) == 2
    assert sorted(world.run()) == ["0", "1", "2", "3", "4"]


def test_others_go_on_while_an_adapter_loads() -> None:
    world = World()
    world.ask("a", "A")
    world.ask("base")
    assert world.step().keys() == {"base"}
    assert world.step().keys() == {"base", "a"}


def test_those_that_came_last_give_way_and_nobody_is_lost() -> None:
    world = World(rows=4, room=40)
    for i in range(6):
        world.ask(str(i), prompt=6, answer=20)
    assert sorted(world.run()) == [str(i) for i in range(6)]
    assert world.rows.taken == {}


def test_a_busy_adapter_does_not_starve_a_cold_one() -> None:
    world = World(rows=2, quantum=16)
    for i in range(50):
        world.ask(f"busy{i}", "A", answer=10)
    for _ in range(30):
        world.step()
    world.ask("cold", "B", answer=2)
    before = len(world.done)
    while "cold" not in world.done:
        world.step()
    assert len(world.done) - before <= 4


def test_shares_are_equal_in_tokens_not_in_requests() -> None:
    world = World(rows=1, quantum=8)
    for i in range(40):
        world.ask(f"long{i}", "A", prompt=1, answer=40)
        world.ask(f"short{i}", "B", prompt=1, answer=4)
    for _ in range(400):
        world.step()
    long = sum(name.startswith("long") for name in world.done) * 40
    short = sum(name.startswith("short") for name in world.done) * 4
    assert 0.6 < long / short < 1.7


def test_tenants_of_an_adapter_share_it() -> None:
    world = World(rows=1, quantum=8)
    for i in range(30):
        world.ask(f"greedy{i}", "A", tenant="greedy")
    for i in range(3):
        world.ask(f"modest{i}", "A", tenant="modest")
    while sum(name.startswith("modest") for name in world.done) < 3:
        world.step()
    assert len(world.done) <= 8


def test_debts_are_forgotten_with_their_requests() -> None:
    world = World()
    for i in range(20):
        world.ask(str(i), f"adapter{i % 3}", tenant=str(i % 2))
    world.run(200)
    waiting = world.scheduler.waiting
    assert (len(waiting), waiting._members, waiting._tenants, waiting._deficits._credit) == (0, {}, {}, {})


def test_what_is_resident_is_used_before_it_gives_way() -> None:
    """Twice as many adapters as fit: each is loaded once, since the requests of one go together."""
    world = World(rows=2, adapters=2, patience=1000)
    for i in range(40):
        world.ask(str(i), f"adapter{i % 4}", answer=2)
    assert len(world.run()) == 40
    assert world.adapters.loads == 4


def test_beyond_patience_nobody_waits_for_ever() -> None:
    world = World(rows=2, adapters=1, patience=0.05)
    world.ask("other", "B")
    for i in range(200):
        world.ask(f"own{i}", "A", answer=3)
    while "other" not in world.done:
        world.step()
        assert world.now < 2
    assert len(world.run(2000)) == 201


def test_a_busy_adapter_whose_requests_are_all_late_keeps_no_other_out() -> None:
    """Its next one was always late and its adapter there, so it was never evicted for one that waited longer."""
    world = World(rows=2, adapters=1, patience=0.05)
    for i in range(30):
        world.ask(f"own{i}", "A", answer=3)
    world.step()
    world.step()
    world.ask("other", "B")
    while "other" not in world.done:
        world.ask(f"later{world.now}", "A", answer=3)
        world.step()
        assert world.now < 2
    assert {f"own{i}" for i in range(30)} < {*world.done}  # they came before it


def test_adapters_that_all_have_late_requests_are_loaded_once_in_a_while() -> None:
    """Twice as many as fit, more requests than can be computed: no adapter is loaded for one request at a time."""
    world = World(rows=2, adapters=2, patience=0.5)
    asked = 0
    for _ in range(1000):  # ten seconds
        while len(world.scheduler.waiting) < 100:
            asked += 1
            world.ask(str(asked), f"adapter{asked % 4}", answer=3)
        world.step()
    assert len(world.done) > 400
    assert world.adapters.loads < len(world.done) / 8
    assert {int(name) % 4 for name in world.done[-100:]} == {0, 1, 2, 3}


def test_the_base_waits_for_no_adapters_memory() -> None:
    world = World(rows=3, adapters=1, patience=0.05)
    world.ask("long", "A", answer=100)
    world.step()
    world.step()
    world.ask("other", "B")
    for _ in range(20):
        world.step()
    world.ask("base")
    assert "base" in world.step()
    assert "other" not in world.done


def test_an_adapter_that_is_unloaded_as_its_request_begins_is_waited_for_again() -> None:
    world = World()
    pin, taken = world.adapters.pin, []

    def unloaded(key: Key) -> bool:
        if key and not taken:
            taken.append(world.adapters.here.pop(key[0][0]))
        return pin(key)

    world.adapters.pin = unloaded  # type: ignore[method-assign]
    world.ask("a", "A")
    world.ask("base")
    assert sorted(world.run(20)) == ["a", "base"]
    assert taken == [0]
    assert world.adapters.loads == 2


def test_an_adapter_has_one_turn_whatever_its_weights() -> None:
    """Else who asks for it at ten slightly other weights would get ten shares."""
    world = World(rows=1, quantum=8)
    for i in range(30):
        world.ask(f"greedy{i}", "A", weight=1 + i / 1000)
        world.ask(f"modest{i}", "B") if i < 5 else None
    while sum(name.startswith("modest") for name in world.done) < 5:
        world.step()
    assert len(world.done) <= 12


@pytest.mark.parametrize("room", [1, 2, 3])
def test_many_late_ones_do_not_take_each_others_adapters_away(room: int) -> None:
    """Each was loaded for the one that waited longest, and evicted for the next before it was used: for ever."""
    world = World(rows=3, adapters=room, patience=0.001)
    for i in range(30):
        world.ask(str(i), f"adapter{i % 10}")
    assert len(world.run(600)) == 30


def test_thousands_that_wait_cost_few_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(rows=4, adapters=1, patience=1000)
    world.ask("first", "adapter0", answer=50)
    world.step()
    world.step()
    for i in range(900):
        world.ask(str(i), f"adapter{i + 1}")
    looks: list[int] = []
    fetch = world.adapters.fetch
    monkeypatch.setattr(world.adapters, "fetch", lambda *a, **k: looks.append(1) or fetch(*a, **k))
    world.step()
    assert len(looks) <= 10


def test_a_request_that_waits_can_be_ended() -> None:
    world = World(rows=1)
    world.ask("a", answer=50)
    waiting = world.ask("b")
    world.step()
    world.scheduler.end(waiting)
    assert world.run(100) == ["a"]


class Anything(RuleBasedStateMachine):
    """Requests come, go and are given up, adapters load when they like and are unloaded by hand, in little memory."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(rows=3, tokens=8, room=60, adapters=3, quantum=8, patience=0.2)
        self.live: dict[str, Request] = {}
        self.ended = 0
        self.settle = self.world.adapters.settle
        self.world.adapters.settle = lambda: None  # type: ignore[method-assign]

    @rule(
        adapters=st.sets(st.sampled_from("ABCDE"), max_size=2),
        prompt=st.integers(1, 50),
        answer=st.integers(1, 10),
        tenant=st.sampled_from(["", "x"]),
    )
    def ask(self, adapters: set[str], prompt: int, answer: int, tenant: str) -> None:
        name = str(self.ended + len(self.live))
        key: Key = tuple((own, 1.0) for own in sorted(adapters))
        sampling = SamplingParams(max_tokens=answer)
        request = Request([0] * prompt, sampling, key, name, tenant=tenant, arrived=self.world.now)
        self.world.scheduler.add(request, dict.fromkeys(adapters))  # type: ignore[arg-type]
        self.live[name] = request

    @precondition(lambda self: self.live)
    @rule(place=st.integers(0, 100))
    def give_up(self, place: int) -> None:
        self.world.scheduler.end(self.live.pop([*self.live][place % len(self.live)]))
        self.ended += 1

    @rule()
    def load(self) -> None:
        self.settle()

    @rule(adapter=st.sampled_from("ABCDE"))
    def unload(self, adapter: str) -> None:
        if self.world.adapters.here.get(adapter) == 0:
            del self.world.adapters.here[adapter]

    @rule(count=st.integers(1, 8))
    def step(self, count: int) -> None:
        for _ in range(count):
            done = len(self.world.done)
            self.world.step(0.05)
            for name in self.world.done[done:]:
                self.live.pop(name)
                self.ended += 1

    @invariant()
    def nobody_is_lost(self) -> None:
        scheduler = self.world.scheduler
        assert {*scheduler.waiting, *scheduler.running} == {*self.live.values()}
        assert len(scheduler.waiting) + len(scheduler.running) == len(self.live)
        assert len(scheduler.running) <= scheduler.config.max_rows
        assert {*scheduler._stored} == {*self.live.values()}

    @invariant()
    def memory_is_kept_for_those_that_run(self) -> None:
        running = self.world.scheduler.running
        assert {*self.world.rows.taken} == {*running}
        pins = Counter(own for request in running for own, _ in request.key)
        assert {own: count for own, count in self.world.adapters.here.items() if count} == dict(pins)
        assert len(self.world.adapters.here) + len(self.world.adapters.coming) <= self.world.adapters.room

    def teardown(self) -> None:
        """All come to their end, and nothing is left of them."""
        self.world.adapters.settle = self.settle  # type: ignore[method-assign]
        for _ in range(40 * (1 + len(self.live))):
            self.world.step(0.05)
        assert {*self.world.done} >= {*self.live}
        waiting = self.world.scheduler.waiting
        assert (len(waiting), waiting._members, waiting._tenants, waiting._deficits._credit) == (0, {}, {}, {})
        assert set(self.world.adapters.here.values()) <= {0}


TestAnything = Anything.TestCase
TestAnything.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
