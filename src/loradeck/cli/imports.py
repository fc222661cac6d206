"""How torch and transformers are imported without delay. Knows the garbage collector; imports neither itself."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def heavy() -> Iterator[None]:
    """Let the block import torch and transformers, which it does first in this process, or nothing is done.

    A quarter of that time goes into looking for garbage among objects that stay for good; so nobody looks, then or
    later.
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
