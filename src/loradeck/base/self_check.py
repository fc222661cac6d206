"""A check, made once per process, that one of torch's private kernels exists here, is correct and is worth using."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

SIZE, ROWS = 512, 5  # of the layer that is tried, and the inputs; above four rows some ops take another kernel
ROUNDS, MAX_SLOWDOWN = 30, 3  # a kernel that is only emulated is slower tenfold or more

Product = Callable[[Tensor], Tensor]


@torch.inference_mode()
def why_not_usable(
    products: Callable[[Tensor], tuple[Product, Product]], dtype: torch.dtype, tolerance: float
) -> str | None:
    """Compare a kernel with the plain product on one 512 x 512 layer; return why not to use it, or None.

    `products` makes (kernel, plain) from a weight (out, in); each maps x (rows, in) to (rows, out). `tolerance` bounds
    their difference as a share of the largest output. Errors that torch raises become the reason.

    Each time is the best of thirty on one thread, so that the answer is the same on a busy machine, where two threads
    wait for each other. It tells an emulated kernel from a real one, not how much faster a real one is.
    """
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(SIZE, SIZE, generator=rng).to(dtype)
    x = torch.randn(ROWS, SIZE, generator=rng).to(dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        kernel, plain = products(weight)
        for rows in (x[:1], x):
            expected = plain(rows)
            error = float((kernel(rows) - expected).abs().max() / expected.abs().max())
            if not error <= tolerance:
                return f"wrong by {error:.1e} on this machine"
        times = [(_seconds(plain, x[:1]), _seconds(kernel, x[:1])) for _ in range(ROUNDS)]
    except Exception as error:  # a missing op, or one that refuses this machine, has no error type of its own
        return f"not available: {str(error).partition(chr(10))[0][:100] or type(error).__name__}"
    finally:
        torch.set_num_threads(threads)
    slowdown = min(kernel for _, kernel in times) / min(plain for plain, _ in times)
    return f"{slowdown:.0f} times slower on this machine" if slowdown > MAX_SLOWDOWN else None


def _seconds(product: Product, x: Tensor) -> float:
    start = time.perf_counter()
    product(x)
    return time.perf_counter() - start
