"""Points of a long computation where its thread may do something else.

Code that computes for long calls `pause` between two parts. That does nothing, but within `pauses`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

_do: ContextVar[Callable[[], None] | None] = ContextVar("loradeck_pause", default=None)


def pause() -> None:
    """Let this thread do what it has to do between two parts of a computation. It may raise Interruption."""
    do = _do.get()
    if do is not None:
        do()


@contextmanager
def pauses(model: nn.Module, do: Callable[[], None]) -> Iterator[None]:
    """Within the block, and in this thread, call `do` at each pause, and between the modules of a model.

    That is after each module without children in the forward pass, and before it in the backward pass; on a GPU, where
    autograd computes the backward pass in another thread, only in the forward pass.
    """

    def before(_: Tensor) -> None:
        pause()

    def after(_: nn.Module, __: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(before)
        pause()

    leaves = [module for module in model.modules() if next(module.children(), None) is None]
    handles = [module.register_forward_hook(after) for module in leaves]
    token = _do.set(do)
    try:
        yield
    finally:
        _do.reset(token)
        for handle in handles:
            handle.remove()
