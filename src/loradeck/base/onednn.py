"""How many compiled kernels oneDNN and torch cache on a CPU."""

import os

VARIABLES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # both are read when the first kernel is compiled


def cap_kernel_cache(count: int = 128) -> None:
    """Limit the kernels that oneDNN and torch keep compiled in this process; call it before the first computation.

    oneDNN compiles a kernel for every shape, hence for every number of rows, and caches 1,024 of them; torch caches as
    many again per thread. At half a megabyte each a server that sees hundreds of batch sizes grows by half a gigabyte.
    The default of 128 holds the two dozen batch sizes that recur, at five shapes each in SmolLM2; compiling one anew
    takes a millisecond, where a step of a small base takes fifty.

    `loradeck serve`, `generate` and `chat` call this, and a Python program that serves on a CPU should too. Training
    should not: sixty jobs have hundreds of shapes, and every layer of every step needs them all.

    It sets the environment variables $ONEDNN_PRIMITIVE_CACHE_CAPACITY and $LRU_CACHE_CAPACITY, unless they are set.
    """
    for name in VARIABLES:
        os.environ.setdefault(name, str(count))
