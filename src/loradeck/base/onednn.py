"""How many compiled kernels this process keeps. Knows oneDNN's and torch's settings for that; computes nothing.

oneDNN compiles a kernel for every shape that it meets, so for every number of rows, and keeps 1,024 of them; torch
keeps as many again for each thread. Here that is half a megabyte each, and a server meets hundreds of numbers of rows.
To compile one anew takes a millisecond, where a step of a small base takes fifty. In training it is the other way
round: the adapters' own products can be oneDNN's too, of each job's shapes, and every layer of a step needs all again.
"""

import os

FEW = 128  # a step of SmolLM2 has five shapes: enough for the two dozen numbers of rows that come again and again
MANY = 1024  # their own number: sixty jobs of fifteen shapes each
SETTINGS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # both are read when the first one is compiled


def keep(count: int) -> None:
    """Keep so many of them, where nothing was compiled yet; what was set before, by the user too, goes before."""
    for name in SETTINGS:
        os.environ.setdefault(name, str(count))
