"""The answer to one request: its tokens and their text, from the engine's thread to one reader."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from threading import Condition
from typing import TypeAlias

from loradeck.errors import LoradeckError
from loradeck.runner.request import Finish, Request
from loradeck.sampling import Token
from loradeck.serve.stop_strings import StopFilter


@dataclass(frozen=True, slots=True)
class TextChunk:
    """What a token added to the text."""

    text: str
    """May be empty: text that may begin a stop string comes with a later chunk."""
    token: Token | None = None
    """None in the last chunk if it only brings text that was held back."""
    offset: int = 0
    """Characters of the answer before the token."""


Item: TypeAlias = tuple[Token, TextChunk | None]


class Generation(AsyncIterator[Token], Iterator[Token]):
    """Iterate over it, in a thread or in an asyncio task, for its tokens; `chunks()` and `text()` give its text.

    There is one reader. The engine stops at the token that completes a stop string, whether anybody reads or not.

    Attributes:
        request: the request and its progress.
        prompt: the prompt's tokens with log-probabilities, if requested; complete before the first token arrives.
        finish: why it ended; None before that.
    """

    def __init__(self, request: Request, text: StopFilter, wake: Callable[[], None]) -> None:
        """`wake` tells the engine that the request was cancelled."""
        self.request = request
        self.prompt: list[Token] = []
        self.finish: Finish | None = None
        self._error: LoradeckError | None = None
        self._filter = text
        self._wake = wake
        self._items: deque[Item] = deque()
        self._changed = Condition()
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None = None

    # ---- for the reader

    def __next__(self) -> Token:
        item = self._wait()
        if item is None:
            raise StopIteration
        return item[0]

    async def __anext__(self) -> Token:
        item = await self._receive()
        if item is None:
            raise StopAsyncIteration
        return item[0]

    def __aiter__(self) -> "Generation":
        return self

    def __iter__(self) -> "Generation":
        return self

    async def chunks(self) -> AsyncIterator[TextChunk]:
        """Yield the text as it grows, without the stop string.

        Raises:
            LoradeckError: the request failed.
        """
        while (item := await self._receive()) is not None:
            token, chunk = item
            yield chunk or self._decode(token)
        if rest := self._filter.flush():
            yield TextChunk(rest)

    def text(self) -> str:
        """Wait for the end and return the text, without the stop string.

        Raises:
            LoradeckError: the request failed.
        """
        texts = []
        while (item := self._wait()) is not None:
            token, chunk = item
            texts.append((chunk or self._decode(token)).text)
        return "".join([*texts, self._filter.flush()])

    def cancel(self) -> None:
        """Give the request up; its row is free within a step. Does nothing after the end."""
        if self.finish is None and not self.request.cancelled:
            self.request.cancelled = True
            self._wake()

    # ---- for the engine

    @property
    def stopped(self) -> bool:
        """Whether the tokens so far complete a stop string."""
        return self._filter.stopped

    def push(self, token: Token) -> None:
        """Add a token. Its text is decoded here if stop strings depend on it, otherwise by the reader."""
        chunk = self._decode(token) if self.request.sampling.stop else None
        with self._changed:
            self._items.append((token, chunk))
            self._notify()

    def end(self, finish: Finish, error: LoradeckError | None = None) -> None:
        """Declare that no token follows; with an error, that the request failed. Only the first call counts."""
        with self._changed:
            if self.finish is None:
                self.finish, self._error = finish, error
                self._notify()

    # ---- inside

    def _decode(self, token: Token) -> TextChunk:
        offset = self._filter.length
        return TextChunk("" if token.ends else self._filter.push(token.id), token, offset)

    def _wait(self) -> Item | None:
        """Block until the next token is there; None after the last one."""
        with self._changed:
            while not self._items and self.finish is None:
                self._changed.wait()
            return self._take()

    async def _receive(self) -> Item | None:
        """Do the same in an asyncio task."""
        while True:
            with self._changed:
                if self._items or self.finish is not None:
                    return self._take()
                loop = asyncio.get_running_loop()
                waiter = loop.create_future()
                self._waiter = (loop, waiter)
            await waiter

    def _take(self) -> Item | None:
        if self._items:
            return self._items.popleft()
        if self._error is not None:
            raise self._error
        return None

    def _notify(self) -> None:
        self._changed.notify_all()
        if self._waiter is not None:
            loop, waiter = self._waiter
            self._waiter = None
            with suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(_resolve, waiter)


def _resolve(waiter: "asyncio.Future[None]") -> None:
    if not waiter.done():
        waiter.set_result(None)
