"""Teams of OpenMP: who has one, and that without a runtime nothing fails."""

import os
import threading
from pathlib import Path

import pytest
import torch

from loradeck.serve import threads

pytestmark = pytest.mark.skipif(threads._runtime() is None, reason="this torch has no OpenMP runtime of its own")


def live_threads() -> set[str]:
    """Threads of this process now; others may end meanwhile."""
    return set(os.listdir("/proc/self/task"))  # noqa: PTH208


def compute() -> None:
    torch.aminmax(torch.ones(2_000_000))


def in_a_thread(work) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_a_team_ends_when_it_is_released(two_threads) -> None:
    def work() -> None:
        before = live_threads()
        compute()
        team = live_threads() - before
        seen.append(len(team))
        assert threads.release()
        seen.append(len(team & live_threads()))
        before = live_threads()
        compute()
        seen.append(len(live_threads() - before))

    seen: list[int] = []
    in_a_thread(work)
    assert seen == [1, 0, 1]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_a_thread_alone_gets_no_team_and_others_keep_theirs(two_threads) -> None:
    def work() -> None:
        before = live_threads()
        assert threads.alone()
        compute()
        seen.append(len(live_threads() - before))

    seen: list[int] = []
    in_a_thread(work)
    assert seen == [0]
    assert torch.get_num_threads() == 2


def test_without_a_runtime_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_runtime", lambda: None)
    assert not threads.release()
    in_a_thread(threads.alone)
    compute()
