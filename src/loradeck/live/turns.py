"""Whose turn it is: training gives way to requests between the layers of the base.

A pass is cut where one module ends and the next begins, forward and backward, and nowhere else. So it computes the same
numbers whatever is served meanwhile.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class Turns:
    """Training's turns and the requests'.

    While requests compute, training has slices of the time, and they have as much after each as its share leaves them,
    at least one step. While there are none, training has all of it, and whatever arrives is served at the next pause.
    """

    def __init__(self, share: float, seconds: float, clock: Callable[[], float] = time.perf_counter) -> None:
        """`share` of the time is training's, in slices of `seconds`."""
        self._rest = (1 - share) / share  # the requests' time for a second of training
        self._slice, self._clock = seconds, clock
        self._shared = False  # whether the last pause found something to serve
        self._start = clock()  # of training's turn
        self._used = 0.0  # seconds of an interrupted turn

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Count the time within the block, but not between two such blocks, as training's."""
        self._start = self._clock() - self._used
        try:
            yield
        finally:
            self._used = self._clock() - self._start

    def pause(self, serve: Callable[[], bool]) -> None:
        """Give way, between two pieces of training, if it is time to; `serve` computes a step, False if it cannot."""
        now = self._clock()
        if self._shared and now - self._start < self._slice:
            return
        end = now + self._rest * (now - self._start if self._shared else self._slice)
        self._shared = False
        while serve():
            self._shared = True
            if self._clock() >= end:
                break
        self._start = self._clock()


@contextmanager
def pauses(model: nn.Module, pause: Callable[[], None]) -> Iterator[None]:
    """Within the block, call `pause` after each module of a model in the forward pass, and before it in the backward.

    Only modules without children count, and only in this thread: on a GPU, autograd computes the backward pass in
    another one.
    """
    thread = threading.get_ident()

    def before(_: Tensor) -> None:
        if threading.get_ident() == thread:
            pause()

    def after(_: nn.Module, __: Any, output: Any) -> None:
        if threading.get_ident() == thread:
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(before)
            pause()

    leaves = [module for module in model.modules() if next(module.children(), None) is None]
    handles = [module.register_forward_hook(after) for module in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
