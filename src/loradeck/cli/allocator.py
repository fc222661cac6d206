"""How much freed memory a process of many threads keeps. Knows glibc's allocator; changes the whole process."""

import ctypes
import os

# Of mallopt, by malloc.h. glibc gives a thread an arena of its own, up to eight for each core, and keeps there what the
# thread has freed; and once 10 MB were freed, it no longer asks the system for the next 10 MB alone, so that adapters
# that come and go leave holes. A server's threads read and write whole adapters, each in its turn.
ARENA_MAX, MMAP_THRESHOLD, TRIM_THRESHOLD = -8, -3, -1
SETTINGS = {
    ARENA_MAX: 2,
    MMAP_THRESHOLD: 4 << 20,  # above what a step of a small base needs, below most adapters in float32
    TRIM_THRESHOLD: 64 << 20,  # or what a step frees would be given back, and taken again by the next
}


def thrifty() -> bool:
    """Let this process give freed memory back, and say whether it does now; `$MALLOC_…` goes before."""
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        done = [ctypes.CDLL(None).mallopt(*setting) for setting in SETTINGS.items()]
    except (OSError, AttributeError, TypeError):  # another allocator, or another system
        return False
    return all(done)
