"""How many compiled kernels this process keeps. Knows oneDNN's and torch's settings for that; computes nothing.

oneDNN compiles a kernel for every shape that it meets, so for every number of rows, and keeps 1,024 of them; torch
keeps as many again for each thread. Here that is half a megabyte each, and a server meets hundreds of numbers of rows.
To compile one anew takes a millisecond, where a step of a small base takes fifty.
"""

import os

KEPT = 128  # a step of SmolLM2 has five shapes: enough for the two dozen numbers of rows that come again and again
SETTINGS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # both are read when the first one is compiled


def keep_few() -> None:
    """Keep few of them from now on, where nothing was compiled yet; the user's own settings go before."""
    for name in SETTINGS:
        os.environ.setdefault(name, str(KEPT))
