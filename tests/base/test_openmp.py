"""Teams of OpenMP: who has one, when others get the cores, and that without a runtime nothing fails."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from loradeck.base import openmp
from loradeck.base.openmp import CONTENDED, FREE, PATIENCE, VARIABLES, Contention

pytestmark = pytest.mark.skipif(openmp._runtime() is None, reason="this torch has no OpenMP runtime of its own")


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
        assert openmp.release()
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
        assert openmp.alone()
        compute()
        seen.append(len(live_threads() - before))

    seen: list[int] = []
    in_a_thread(work)
    assert seen == [0]
    assert torch.get_num_threads() == 2


def test_without_a_runtime_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openmp, "_runtime", lambda: None)
    assert not openmp.release()
    in_a_thread(openmp.alone)
    compute()


# ---- sharing the cores

gnu = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux, where torch brings GNU's OpenMP runtime")


def test_others_need_the_cores_from_the_first_look_that_says_so_until_several_say_otherwise() -> None:
    contention = Contention()
    assert not contention.update(0.01)
    assert contention.update(CONTENDED + 0.01)
    assert contention.update((CONTENDED + FREE) / 2), "between the two bounds nothing changes"
    assert all(contention.update(FREE - 0.01) for _ in range(PATIENCE - 1))
    assert not contention.update(FREE - 0.01)
    assert not contention.update((CONTENDED + FREE) / 2), "between the two bounds nothing changes"


@gnu
def test_a_team_too_many_comes_and_goes(two_threads) -> None:
    def work() -> None:
        before = live_threads()
        assert openmp._hold(True)
        team = live_threads() - before
        seen.append(len(team) + 2 > len(os.sched_getaffinity(0)))  # with the thread itself, and the one that computes
        assert openmp._hold(False)
        seen.append(not team & live_threads())

    seen: list[bool] = []
    in_a_thread(work)
    assert seen == [True, True]


# A process that computes beside more busy loops than there are cores, until its cores are shared.
BESIDE_OTHERS = """
import subprocess, sys, threading, time, os
from loradeck.base import openmp
held = threading.Event()
hold = openmp._hold
def told(holds):
    done = hold(holds)
    if done and holds: held.set()
    return done
openmp._hold = told
assert openmp.share_cores() and openmp.share_cores()
assert [thread.name for thread in threading.enumerate()].count("loradeck-share-cores") == 1
import torch
loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(len(os.sched_getaffinity(0)) + 1)]
end = time.monotonic() + 600
while not held.is_set() and time.monotonic() < end: torch.ones(1_000_000).sum()
for loop in loops: loop.kill()
print(held.is_set(), flush=True)
os._exit(0)
"""
# Whether a command, a library or a call shares the cores of its process.
SHARES = {
    "command": "from loradeck.cli import main; main(['--version'])",
    "library": "import torch, loradeck; loradeck.Bank(torch.nn.Linear(2, 2))",
    "call": "from loradeck.base.openmp import share_cores; share_cores()",
}


def output(code: str, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    result = subprocess.run([sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@gnu
def test_beside_others_the_cores_are_shared() -> None:
    assert output(BESIDE_OTHERS) == "True\n"


@gnu
@pytest.mark.parametrize(("how", "shares"), [("command", True), ("library", False), ("call", True)])
def test_a_command_and_the_call_share_cores_and_a_library_does_not(how: str, shares: bool) -> None:
    names = "import threading; print([thread.name for thread in threading.enumerate()])"
    assert ("loradeck-share-cores" in output(f"{SHARES[how]}\n{names}")) == shares


@gnu
@pytest.mark.parametrize("name", VARIABLES)
def test_the_users_variables_take_precedence(name: str) -> None:
    code = "from loradeck.base import openmp; print(openmp.share_cores(), openmp.why_not_shared())"
    assert output(code, **{name: "1" if name == VARIABLES[0] else "passive"}) == f"False {name} is set\n"
    assert output(code) == "True None\n"
