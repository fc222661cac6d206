"""Whether a kernel that torch does not promise is there, right, and worth its use. Knows no kernel by name."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

SIDE, FEW = 512, 5  # of the layer that is tried, and the rows; above four, some of torch's ops take another kernel
ROUNDS, SLOWER = 30, 3  # a kernel that is only emulated is slower tenfold or more

Product = Callable[[Tensor], Tensor]


@torch.inference_mode()
def self_check(pair: Callable[[Tensor], tuple[Product, Product]], dtype: torch.dtype, tolerance: float) -> str:
    """Try a kernel against the plain way on one layer of 512 x 512, and return why not to use it; "" if nothing is.

    `pair` makes (fast, plain) of a weight (out, in); each maps x (rows, in) to (rows, out). `tolerance` bounds their
    difference, as a share of the largest output. No error of torch's gets out.

    Times are the best of thirty, on one thread: so the answer is the same on a busy machine, where two threads wait
    for each other. They tell an emulated kernel from a real one, and not how much faster a real one is.
    """
    chance = torch.Generator().manual_seed(0)
    weight = torch.randn(SIDE, SIDE, generator=chance).to(dtype)
    x = torch.randn(FEW, SIDE, generator=chance).to(dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        fast, plain = pair(weight)
        for rows in (x[:1], x):
            expected = plain(rows)
            error = float((fast(rows) - expected).abs().max() / expected.abs().max())
            if not error <= tolerance:
                return f"is off by {error:.1e} here"
        times = [(_seconds(plain, x[:1]), _seconds(fast, x[:1])) for _ in range(ROUNDS)]
    except Exception as error:  # an op that is missing, or refuses this machine, says so in no common way
        said = str(error).partition("\n")[0][:100] or type(error).__name__
        return f"is not to be had here ({said})"
    finally:
        torch.set_num_threads(threads)
    ratio = min(other for _, other in times) / min(one for one, _ in times)
    return f"is slower here, {ratio:.0f} times" if ratio > SLOWER else ""


def _seconds(product: Product, x: Tensor) -> float:
    begun = time.perf_counter()
    product(x)
    return time.perf_counter() - begun
