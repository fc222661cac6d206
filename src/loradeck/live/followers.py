"""Those who wait for a job's next event, in asyncio."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Lock


class Followers:
    """Wakes whoever follows a job. Any thread may call `wake`."""

    def __init__(self) -> None:
        self._events: dict[str, set[tuple[asyncio.AbstractEventLoop, asyncio.Event]]] = {}
        self._lock = Lock()

    @contextmanager
    def changes(self, id: str) -> Iterator[asyncio.Event]:
        """Yield an event that is set whenever something happens to a job; whoever waits clears it."""
        follower = asyncio.get_running_loop(), asyncio.Event()
        with self._lock:
            self._events.setdefault(id, set()).add(follower)
        try:
            yield follower[1]
        finally:
            with self._lock:
                self._events[id].discard(follower)
                if not self._events[id]:
                    del self._events[id]

    def wake(self, id: str) -> None:
        """Say that something happened to a job."""
        with self._lock:
            for loop, event in self._events.get(id, ()):
                with suppress(RuntimeError):  # the loop is closed
                    loop.call_soon_threadsafe(event.set)

    def wake_all(self) -> None:
        """Wake the followers of all jobs."""
        for id in [*self._events]:
            self.wake(id)
