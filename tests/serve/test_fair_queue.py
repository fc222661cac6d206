"""Deficit round-robin, over adapters and then over tenants. Plain Python."""

from collections import Counter

import pytest

from loradeck.runner.request import Request
from loradeck.serve.fair_queue import Deficits, FairQueue


def request(adapter: str = "", tenant: str = "", weight: float = 1.0) -> Request:
    return Request([0], key=((adapter, weight),) if adapter else (), id=f"{adapter}/{tenant}", tenant=tenant)


def filled(queue: FairQueue, *names: str, count: int = 10) -> dict[str, list[Request]]:
    """Push `count` requests of each adapter, those of the first one first."""
    made = {name: [request(name) for _ in range(count)] for name in names}
    for own in made.values():
        for each in own:
            queue.push(each)
    return made


def served(queue: FairQueue, count: int, tokens: dict[str, int]) -> Counter[str]:
    """Pop requests that each take `tokens` tokens; return the tokens of each adapter."""
    taken: Counter[str] = Counter()
    for _ in range(count):
        own = queue.pop(lambda _: True)
        assert own is not None
        name = own.id.split("/")[0]
        queue.charge(own, tokens[name])
        queue.end(own)
        taken[name] += tokens[name]
    return taken


def test_within_a_queue_the_first_goes_first() -> None:
    queue = FairQueue(8)
    own = filled(queue, "a")["a"]
    assert [queue.pop(lambda _: True) for _ in range(10)] == own
    assert queue.pop(lambda _: True) is None
    assert len(queue) == 0


def test_queues_take_queue() -> None:
    queue = FairQueue(8)
    filled(queue, "a", "b", "c")
    order = [own.key[0][0] for _ in range(6) if (own := queue.pop(lambda _: True))]
    assert order == ["a", "b", "c"] * 2


def test_shares_are_equal_in_tokens() -> None:
    queue = FairQueue(16)
    filled(queue, "long", "short", count=200)
    taken = served(queue, 150, {"long": 50, "short": 5})
    assert taken["long"] / taken["short"] == pytest.approx(1.0, abs=0.3)


def test_a_queue_that_is_not_able_is_passed_over_and_keeps_its_turn() -> None:
    queue = FairQueue(8)
    filled(queue, "a", "b")
    assert queue.pop(lambda own: own.key[0][0] == "b").key[0][0] == "b"  # type: ignore[union-attr]
    assert next(queue.heads()).key[0][0] == "a"
    assert queue.pop(lambda _: False) is None
    assert len(queue) == 19


def test_those_in_debt_go_where_nobody_else_is_able() -> None:
    queue = FairQueue(8)
    made = filled(queue, "a", "b")
    queue.charge(made["a"][0], 10_000)
    assert queue.pop(lambda _: True) is made["b"][0]
    assert queue.pop(lambda own: own.key[0][0] == "a") is made["a"][0]


def test_credit_is_never_more_than_a_quantum() -> None:
    """Else a queue that could not go for long would take everything at once afterwards."""
    own: Deficits[str] = Deficits(8)
    for _ in range(50):
        own.charge("busy", 100)
        assert own.first(["idle", "busy"], lambda name: name == "busy") == "busy"
    assert own._credit["idle"] == 8


def test_a_look_changes_no_turn() -> None:
    queue = FairQueue(8)
    for tenant in ("x", "y"):
        for _ in range(3):
            queue.push(request("a", tenant))
    queue.charge(request("a", "x"), 20)
    queue.charge(request("a", "y"), 20)
    looks = [next(queue.heads()) for _ in range(5)]
    assert len({*looks}) == 1
    assert queue.pop(lambda _: True) is looks[0]


def test_tenants_take_queue_within_an_adapter() -> None:
    queue = FairQueue(8)
    for _ in range(20):
        queue.push(request("a", "heavy"))
    for _ in range(3):
        queue.push(request("a", "light"))
    order = []
    for _ in range(6):
        own = queue.pop(lambda _: True)
        assert own is not None
        queue.charge(own, 10)
        order.append(own.tenant)
    assert order == ["heavy", "light"] * 3


def test_who_waits_again_goes_first() -> None:
    queue = FairQueue(8)
    filled(queue, "a", "b")
    own = queue.pop(lambda _: True)
    assert own is not None
    queue.push(own, again=True)
    assert queue.pop(lambda _: True) is own
    assert len(queue) == 19


def test_nothing_is_kept_of_queues_that_are_done() -> None:
    queue = FairQueue(8)
    for i in range(50):
        queue.push(request(f"a{i}", f"t{i % 7}", weight=i))
    waiting = [*queue]
    assert len(waiting) == 50
    for own in waiting[::2]:
        queue.charge(own, 5)
    for own in waiting:
        queue.remove(own)
        queue.end(own)
    assert (len(queue), queue._queues, queue._deficits._credit, queue._tenants, queue._members) == (0, {}, {}, {}, {})


def test_a_debt_outlives_an_empty_queue_while_a_request_runs() -> None:
    """Else who sends one request at a time would never owe anything."""
    queue = FairQueue(8)
    first, later, other = request("a"), request("a"), request("b")
    queue.push(first)
    assert queue.pop(lambda _: True) is first
    queue.charge(first, 100)
    queue.push(later)
    queue.push(other)
    assert queue.pop(lambda _: True) is other
    assert queue.pop(lambda _: True) is later
