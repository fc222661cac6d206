"""One request's tokens on their way to whoever waits for them: a thread, or a task of asyncio. Knows no model."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from threading import Condition

from loradeck.errors import LoradeckError
from loradeck.serve.observer import Finish
from loradeck.serve.request import Request, Token


class Stream(AsyncIterator[Token], Iterator[Token]):
    """The tokens of one request, as they come; for one reader.

    Attributes:
        request: what was asked, and how far it is.
        prompt: its prompt's tokens with their log-probabilities, where these were asked for; whole before any token.
        finish: how it ended; None until then.
        given_up: how it is to end, where nobody waits for it any more.
    """

    def __init__(self, request: Request, wake: Callable[[], None]) -> None:
        """`wake` tells the engine that something changed."""
        self.request = request
        self.prompt: list[Token] = []
        self.finish: Finish | None = None
        self.given_up: Finish = "cancelled"
        self._error: LoradeckError | None = None
        self._wake = wake
        self._tokens: deque[Token] = deque()
        self._changed = Condition()
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None = None

    def cancel(self, finish: Finish = "cancelled") -> None:
        """Give the request up, and call that its `finish`; its place is free within a step. Afterwards, do nothing."""
        if self.finish is None and not self.request.cancelled:
            self.given_up = finish
            self.request.cancelled = True
            self._wake()

    def __next__(self) -> Token:
        with self._changed:
            while not self._tokens and self.finish is None:
                self._changed.wait()
            token = self._taken()
        if token is None:
            raise StopIteration
        return token

    async def __anext__(self) -> Token:
        while True:
            with self._changed:
                if self._tokens or self.finish is not None:
                    token = self._taken()
                    break
                loop = asyncio.get_running_loop()
                waiter = loop.create_future()
                self._waiter = (loop, waiter)
            await waiter
        if token is None:
            raise StopAsyncIteration
        return token

    def __aiter__(self) -> "Stream":
        return self

    def __iter__(self) -> "Stream":
        return self

    # ---- the engine's side

    def push(self, token: Token) -> None:
        """Add a token."""
        with self._changed:
            self._tokens.append(token)
            self._tell()

    def end(self, finish: Finish, error: LoradeckError | None = None) -> None:
        """Say that no token follows; with an error, that the request failed."""
        with self._changed:
            if self.finish is None:
                self.finish, self._error = finish, error
                self._tell()

    def _taken(self) -> Token | None:
        if self._tokens:
            return self._tokens.popleft()
        if self._error is not None:
            raise self._error
        return None

    def _tell(self) -> None:
        self._changed.notify_all()
        if self._waiter is not None:
            loop, waiter = self._waiter
            self._waiter = None
            with suppress(RuntimeError):  # its loop was closed: nobody waits
                loop.call_soon_threadsafe(_done, waiter)


def _done(waiter: "asyncio.Future[None]") -> None:
    if not waiter.done():
        waiter.set_result(None)
