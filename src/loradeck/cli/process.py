"""Settings of the process that runs a verb: quick imports, and how much freed memory glibc keeps."""

import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Parameters of mallopt, from malloc.h. By default glibc gives each thread an arena of its own, up to eight per core,
# which keeps what its threads free; and once it has freed a block of 10 MB it takes blocks of that size from the heap,
# where adapters that come and go leave holes. A server's threads all read and write whole adapters.
ARENA_MAX, MMAP_THRESHOLD, TRIM_THRESHOLD = -8, -3, -1
SETTINGS = {
    ARENA_MAX: 2,
    MMAP_THRESHOLD: 4 << 20,  # more than a step of a small base needs, less than most adapters in float32
    TRIM_THRESHOLD: 64 << 20,  # lower, and every step would return its memory and request it again
}


def cap_allocator() -> bool:
    """Make glibc return freed memory to the system; return whether it will. `$MALLOC_…` variables take precedence."""
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        results = [ctypes.CDLL(None).mallopt(*setting) for setting in SETTINGS.items()]
    except (OSError, AttributeError, TypeError):  # another allocator, or another system
        return False
    return all(results)


def rank_of_process() -> int:
    """Return which of the processes that torchrun has started this is; 0 for the first, and for one alone."""
    return int(os.environ["RANK"]) if "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1 else 0


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import torch and transformers in a quarter less time, by pausing the garbage collector.

    Their objects are permanent, so the collector is told to skip them from then on. Does nothing if torch is imported
    already.
    """
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
