"""Deficit round-robin, over adapters and then over tenants. Plain Python."""

from collections import Counter

import pytest

from loradeck.serve.fair_queue import Deficits, FairQueue
from loradeck.serve.request import Request, SamplingParams


def request(adapter: str = "", tenant: str = "", weight: float = 1.0) -> Request:
    return Request(
        f"{adapter}/{tenant}", [0], 1, ((adapter, weight),) if adapter else (), SamplingParams(), tenant=tenant
    )


def filled(turns: FairQueue, *names: str, count: int = 10) -> dict[str, list[Request]]:
    """Push `count` requests of each adapter, those of the first one first."""
    made = {name: [request(name) for _ in range(count)] for name in names}
    for own in made.values():
        for each in own:
            turns.push(each)
    return made


def served(turns: FairQueue, count: int, tokens: dict[str, int]) -> Counter[str]:
    """Take requests out, one after the other, each of which takes so many tokens; the tokens of each adapter."""
    taken: Counter[str] = Counter()
    for _ in range(count):
        own = turns.next(lambda _: True)
        assert own is not None
        name = own.id.split("/")[0]
        turns.charge(own, tokens[name])
        turns.done(own)
        taken[name] += tokens[name]
    return taken


def test_within_a_queue_the_first_goes_first() -> None:
    turns = FairQueue(8)
    own = filled(turns, "a")["a"]
    assert [turns.next(lambda _: True) for _ in range(10)] == own
    assert turns.next(lambda _: True) is None
    assert len(turns) == 0


def test_queues_take_turns() -> None:
    turns = FairQueue(8)
    filled(turns, "a", "b", "c")
    order = [own.key[0][0] for _ in range(6) if (own := turns.next(lambda _: True))]
    assert order == ["a", "b", "c"] * 2


def test_shares_are_equal_in_tokens() -> None:
    turns = FairQueue(16)
    filled(turns, "long", "short", count=200)
    taken = served(turns, 150, {"long": 50, "short": 5})
    assert taken["long"] / taken["short"] == pytest.approx(1.0, abs=0.3)


def test_a_queue_that_is_not_able_is_passed_over_and_keeps_its_turn() -> None:
    turns = FairQueue(8)
    filled(turns, "a", "b")
    assert turns.next(lambda own: own.key[0][0] == "b").key[0][0] == "b"  # type: ignore[union-attr]
    assert next(turns.heads()).key[0][0] == "a"
    assert turns.next(lambda _: False) is None
    assert len(turns) == 19


def test_those_in_debt_go_where_nobody_else_is_able() -> None:
    turns = FairQueue(8)
    made = filled(turns, "a", "b")
    turns.charge(made["a"][0], 10_000)
    assert turns.next(lambda _: True) is made["b"][0]
    assert turns.next(lambda own: own.key[0][0] == "a") is made["a"][0]


def test_credit_is_never_more_than_a_quantum() -> None:
    """Else a queue that could not go for long would take everything at once afterwards."""
    own: Deficits[str] = Deficits(8)
    for _ in range(50):
        own.charge("busy", 100)
        assert own.first(["idle", "busy"], lambda name: name == "busy") == "busy"
    assert own._left["idle"] == 8


def test_a_look_changes_no_turn() -> None:
    turns = FairQueue(8)
    for tenant in ("x", "y"):
        for _ in range(3):
            turns.push(request("a", tenant))
    turns.charge(request("a", "x"), 20)
    turns.charge(request("a", "y"), 20)
    looks = [next(turns.heads()) for _ in range(5)]
    assert len({*looks}) == 1
    assert turns.next(lambda _: True) is looks[0]


def test_tenants_take_turns_within_an_adapter() -> None:
    turns = FairQueue(8)
    for _ in range(20):
        turns.push(request("a", "heavy"))
    for _ in range(3):
        turns.push(request("a", "light"))
    order = []
    for _ in range(6):
        own = turns.next(lambda _: True)
        assert own is not None
        turns.charge(own, 10)
        order.append(own.tenant)
    assert order == ["heavy", "light"] * 3


def test_who_waits_again_goes_first() -> None:
    turns = FairQueue(8)
    filled(turns, "a", "b")
    own = turns.next(lambda _: True)
    assert own is not None
    turns.push(own, again=True)
    assert turns.next(lambda _: True) is own
    assert len(turns) == 19


def test_nothing_is_kept_of_queues_that_are_done() -> None:
    turns = FairQueue(8)
    for i in range(50):
        turns.push(request(f"a{i}", f"t{i % 7}", weight=i))
    waiting = [*turns]
    assert len(waiting) == 50
    for own in waiting[::2]:
        turns.charge(own, 5)
    for own in waiting:
        turns.remove(own)
        turns.done(own)
    assert (len(turns), turns._queues, turns._credits._left, turns._tenants, turns._members) == (0, {}, {}, {}, {})


def test_a_debt_outlives_an_empty_queue_while_a_request_runs() -> None:
    """Else who sends one request at a time would never owe anything."""
    turns = FairQueue(8)
    first, later, other = request("a"), request("a"), request("b")
    turns.push(first)
    assert turns.next(lambda _: True) is first
    turns.charge(first, 100)
    turns.push(later)
    turns.push(other)
    assert turns.next(lambda _: True) is other
    assert turns.next(lambda _: True) is later
