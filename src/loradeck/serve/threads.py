"""OpenMP thread teams of this process.

Each thread that computes in parallel gets a team of OpenMP threads and keeps it. When all teams together have more
threads than there are cores, GNU's runtime stops their active waiting: each small operation of each thread then costs
a wake-up, 0.25 ms instead of 0.05 (two cores). So only the thread that computes should have a team.
"""

import ctypes
from functools import cache
from pathlib import Path

import torch

PAUSE_SOFT = 1  # omp_pause_soft of OpenMP 5.0: the threads end, the settings stay


def release() -> bool:
    """End the calling thread's team; it gets a new one when it computes again. False if OpenMP cannot do that."""
    pause = getattr(_runtime(), "omp_pause_resource_all", None)
    return pause is not None and pause(PAUSE_SOFT) == 0


def alone() -> bool:
    """Let the calling thread compute without a team from now on. False if OpenMP cannot do that."""
    torch.get_num_threads()  # torch sets the number in each thread when it first asks
    limit = getattr(_runtime(), "omp_set_num_threads", None)
    if limit is not None:
        limit(1)
    return torch.get_num_threads() == 1


@cache
def _runtime() -> ctypes.CDLL | None:
    """Return the OpenMP runtime that came with torch, or None."""
    for pattern in ("libgomp*", "libiomp5*", "libomp*"):
        for file in sorted((Path(torch.__file__).parent / "lib").glob(pattern)):
            try:
                return ctypes.CDLL(str(file))
            except OSError:
                continue
    return None
