"""OpenMP's thread teams: who has one, and how its threads wait.

torch computes in a team of OpenMP threads that wait for each other after every operation, hundreds of times a step. In
GNU's runtime a thread that waits spins for some ten milliseconds before it sleeps. When all teams of the process
together have more threads than there are cores, it spins 300 times less, and a small operation that meets sleeping
threads costs 0.25 ms instead of 0.05 (two cores). So on an idle machine only the thread that computes should have a
team. Beside other busy processes it is the other way round: threads that spin take the cores from the ones they wait
for. `share_cores` makes the runtime spin less as long as that is so, by a team too many.
"""

import ctypes
import os
import sys
import threading
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path

PAUSE_SOFT = 1  # omp_pause_soft of OpenMP 5.0: the threads end, the settings stay
VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")  # how the user tells GNU's runtime to wait
PERIOD = 0.25  # seconds between two looks at the machine
CONTENDED, FREE = 0.15, 0.08  # seconds that this process's threads have waited for a core, per second
PATIENCE = 4  # looks in a row that find the cores free, before threads spin again
TASKS = Path("/proc/self/task")

_sharing = threading.Lock()  # held by the one thread that shares the cores


def release() -> bool:
    """End the calling thread's team; it gets a new one when it computes again. False if OpenMP cannot do that."""
    pause = getattr(_runtime(), "omp_pause_resource_all", None)
    return pause is not None and pause(PAUSE_SOFT) == 0


def alone() -> bool:
    """Let the calling thread compute without a team from now on. False if OpenMP cannot do that."""
    import torch

    torch.get_num_threads()  # torch sets the number in each thread when it first asks
    limit = getattr(_runtime(), "omp_set_num_threads", None)
    if limit is not None:
        limit(1)
    return torch.get_num_threads() == 1


def share_cores() -> bool:
    """Let this process's waiting threads sleep as long as other processes need the cores; return whether they will.

    A thread looks at the machine four times a second, from now on. The `loradeck` command calls this; another program
    may call it once, at any time. Needs Linux and GNU's OpenMP runtime, which torch has there. Does nothing if the user
    has set $GOMP_SPINCOUNT or $OMP_WAIT_POLICY.
    """
    if why_not_shared():
        return False
    if _sharing.acquire(blocking=False):
        threading.Thread(target=_watch, name="loradeck-share-cores", daemon=True).start()
    return True


def why_not_shared() -> str | None:
    """Return why `share_cores` does nothing here; None if it works."""
    if names := [name for name in VARIABLES if name in os.environ]:
        return f"{names[0]} is set"
    if not (TASKS / str(threading.get_native_id()) / "schedstat").exists():
        return "the system does not tell how long threads wait for a core"
    if "torch" in sys.modules and not hasattr(_runtime(), "GOMP_parallel"):
        return "torch's OpenMP runtime is not GNU's"
    return None


class Contention:
    """Decides from how long threads wait for cores whether others need them."""

    def __init__(self) -> None:
        self.contended = False
        self._quiet = 0  # looks in a row that found the cores free

    def update(self, share: float) -> bool:
        """Take the seconds of waiting per second since the last look; return whether others need the cores."""
        self._quiet = self._quiet + 1 if share < FREE else 0
        self.contended = share > CONTENDED or (self.contended and self._quiet < PATIENCE)
        return self.contended


def _watch() -> None:
    contention, holds = Contention(), False
    delays, now = _delays(), time.monotonic()
    while True:
        time.sleep(PERIOD)
        delays_before, before = delays, now
        delays, now = _delays(), time.monotonic()
        waited = sum(max(0, delay - delays_before.get(task, delay)) for task, delay in delays.items())
        is_contended = contention.update(waited / 1e9 / (now - before))
        if is_contended != holds and _hold(is_contended):
            holds = is_contended


def _delays() -> Mapping[str, int]:
    """Return for how many nanoseconds each thread of this process was ready to run and had no core."""
    delays: dict[str, int] = {}
    for task in os.listdir(TASKS):  # noqa: PTH208 - four times a second, without a path for each
        try:
            with open(f"{TASKS}/{task}/schedstat", "rb") as file:  # noqa: PTH123 - as above
                delays[task] = int(file.read().split()[1])
        except (OSError, IndexError):  # it has ended
            continue
    return delays


def _hold(holds: bool) -> bool:
    """Give the calling thread a team that makes all teams larger than the cores, or end it; False before torch runs."""
    torch = sys.modules.get("torch")
    compute = getattr(_runtime(), "GOMP_parallel", None) if hasattr(torch, "get_num_threads") else None
    if torch is None or compute is None:
        return False
    if not holds:
        return release()
    size = max(2, len(os.sched_getaffinity(0)) - torch.get_num_threads() + 2)
    compute(_nothing, None, size, 0)
    return True


@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def _nothing(_: int | None) -> None:
    """The work of the team too many."""


@cache
def _runtime() -> ctypes.CDLL | None:
    """Return the OpenMP runtime that came with torch, or None."""
    import torch

    for pattern in ("libgomp*", "libiomp5*", "libomp*"):
        for file in sorted((Path(torch.__file__).parent / "lib").glob(pattern)):
            try:
                return ctypes.CDLL(str(file))
            except OSError:
                continue
    return None
