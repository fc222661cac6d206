"""Who trains next: fair to owners, within bytes."""

from collections import Counter

from loradeck.live.job_queue import QUANTUM, JobQueue, Ticket


def ticket(id: str, owner: str = "a", nbytes: int = 10, tokens: int = 100) -> Ticket:
    return Ticket(id, owner, nbytes, tokens)


def test_as_many_as_fit_train_at_once() -> None:
    queue = JobQueue(25)
    for n in range(4):
        queue.add(ticket(f"{n}"))
    assert queue.admit() == ["0", "1"]
    assert (queue.training, queue.waiting) == (2, 2)
    assert queue.admit() == []
    queue.remove("0")
    assert queue.admit() == ["2"]
    assert queue.trains("2")
    assert not queue.trains("3")
    assert "3" in queue
    queue.remove("3")
    assert "3" not in queue


def test_an_owner_with_many_jobs_does_not_keep_another_waiting() -> None:
    queue = JobQueue(10)
    for n in range(10):
        queue.add(ticket(f"many-{n}", "many", tokens=QUANTUM))
    order = queue.admit()
    for n in range(3):
        queue.add(ticket(f"few-{n}", "few", tokens=QUANTUM))
    while len(order) < 7:
        queue.remove(order[-1])
        order += queue.admit()
    assert Counter(id.partition("-")[0] for id in order[1:]) == {"few": 3, "many": 3}
    assert [id for id in order if id.startswith("many")] == [f"many-{n}" for n in range(4)], "oldest first"


def test_owners_of_small_jobs_take_turns() -> None:
    queue = JobQueue(10)
    for n in range(4):
        queue.add(ticket(f"many-{n}", "many"))
    queue.add(ticket("few-0", "few"))
    order = queue.admit()
    while queue.waiting:
        queue.remove(order[-1])
        order += queue.admit()
    assert order == ["many-0", "few-0", "many-1", "many-2", "many-3"]


def test_shares_are_equal_in_tokens() -> None:
    """An owner of large jobs takes fewer turns."""
    queue = JobQueue(10)
    for n in range(40):
        queue.add(ticket(f"large-{n}", "large", tokens=4 * QUANTUM))
        queue.add(ticket(f"small-{n}", "small", tokens=QUANTUM))
    order = queue.admit()
    while len(order) < 25:
        queue.remove(order[-1])
        order += queue.admit()
    counts = Counter(id.partition("-")[0] for id in order)
    assert counts["small"] == 20
    assert counts["large"] == 5


def test_a_large_job_is_not_passed_by_small_ones_for_ever() -> None:
    queue = JobQueue(30)
    queue.add(ticket("small-0", "small"))
    queue.add(ticket("small-1", "small", tokens=QUANTUM))
    assert queue.admit() == ["small-0", "small-1"]
    queue.add(ticket("large", "large", nbytes=30))
    queue.add(ticket("small-2", "small"))
    assert queue.admit() == [], "it is the large one's turn, and it does not fit yet"
    queue.remove("small-0")
    assert queue.admit() == []
    queue.remove("small-1")
    assert queue.admit() == ["large"]
