"""Whose turn it is to compute: training's or the requests'."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


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
