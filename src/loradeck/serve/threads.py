"""Which threads of this process have OpenMP threads of their own. Knows torch's OpenMP runtime; knows no engine.

Each thread that computes in parallel gets a team, and keeps it. Where all teams together are more than the cores, GNU's
runtime no longer lets them wait actively: every small operation of every thread then costs an awakening, 0.25 ms in
place of 0.05 (two cores). So only the thread that computes may have a team.
"""

import ctypes
from functools import cache
from pathlib import Path

import torch

SOFT = 1  # omp_pause_soft, of OpenMP 5.0: the threads end, settings stay


def release() -> bool:
    """End the calling thread's team, and say whether there is a way to; it gets another when it computes again."""
    pause = getattr(_runtime(), "omp_pause_resource_all", None)
    return pause is not None and pause(SOFT) == 0


def alone() -> bool:
    """Let the calling thread compute without a team from now on, and say whether there is a way to."""
    torch.get_num_threads()  # torch sets the number in each thread when it first asks
    limit = getattr(_runtime(), "omp_set_num_threads", None)
    if limit is not None:
        limit(1)
    return torch.get_num_threads() == 1


@cache
def _runtime() -> ctypes.CDLL | None:
    """Return the OpenMP runtime that came with torch; None where it is not found, as on a build without one."""
    for pattern in ("libgomp*", "libiomp5*", "libomp*"):
        for file in sorted((Path(torch.__file__).parent / "lib").glob(pattern)):
            try:
                return ctypes.CDLL(str(file))
            except OSError:
                continue
    return None
