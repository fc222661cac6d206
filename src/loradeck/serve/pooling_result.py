"""The answer to one request for pooling: a vector or logits, from the engine's thread to one reader."""

import asyncio
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import Any

from torch import Tensor

from loradeck.errors import BusyError, LoradeckError
from loradeck.runner.pooling_runner import PoolingRow
from loradeck.runner.request import Finish, Request


class PoolingResult:
    """Await it in an asyncio task, or ask for its `result()` in a thread.

    Attributes:
        request: the request and its times.
        row: what is computed.
        labels: the names of its adapter's labels; () if nobody has named them.
        finish: why it ended; None before that.
    """

    def __init__(self, request: Request, row: PoolingRow, labels: tuple[str, ...], wake: Callable[[], None]) -> None:
        """`wake` tells the engine that the request was cancelled."""
        self.request, self.row, self.labels = request, row, labels
        self.finish: Finish | None = None
        self._wake = wake
        self._result: Any = None
        self._future: Future[Tensor] = Future()

    # ---- for the reader

    def result(self) -> Tensor:
        """Wait for the result: a vector, logits of labels or, of a base for tokens, those of each token; float32.

        Raises:
            BusyError: it was cancelled, perhaps because the engine is shutting down.
            LoradeckError: the request failed.
        """
        return self._future.result()

    def __await__(self) -> Generator[Any, None, Tensor]:
        return asyncio.shield(asyncio.wrap_future(self._future)).__await__()

    def cancel(self) -> None:
        """Give the request up. Does nothing after the end."""
        if self.finish is None and not self.request.cancelled:
            self.request.cancelled = True
            self._wake()

    # ---- for the engine

    def succeed(self, result: Tensor) -> None:
        """Set the result; `end` follows."""
        self._result = result

    def end(self, finish: Finish, error: LoradeckError | None = None) -> None:
        """Declare the end; with an error, that the request failed. Only the first call counts."""
        if self.finish is not None:
            return
        self.finish = finish
        if finish == "stop":
            self._future.set_result(self._result)
        else:
            self._future.set_exception(error or BusyError("the request was cancelled", retry_after=1))
