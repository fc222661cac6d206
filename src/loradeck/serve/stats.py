"""What an engine tells about itself: numbers on request, and events as they happen."""

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

from loradeck.runner.interface import Cache
from loradeck.runner.request import Finish, Request
from loradeck.serve.drafter import Drafter
from loradeck.serve.scheduler import Scheduler

RECENT = 64  # ended requests from which the throughput is estimated


class Observer(Protocol):
    """Receives events in the engine's thread, so it must be quick. The times are on the request."""

    def admitted(self, request: Request) -> None:
        """The request left the queue; the engine starts to read its prompt."""
        ...

    def token(self, request: Request, since: float) -> None:
        """The request got a token, `since` seconds after the one before, or after its arrival."""
        ...

    def finished(self, request: Request, finish: Finish) -> None:
        """The request ended."""
        ...


@dataclass(frozen=True, slots=True)
class Stats:
    """An engine's current load."""

    scheduler: Scheduler
    _ends: deque[float] = field(init=False, default_factory=lambda: deque(maxlen=RECENT))

    @property
    def running(self) -> int:
        """Requests that have a row."""
        return len(self.scheduler.running)

    @property
    def waiting(self) -> int:
        """Requests that have no row yet."""
        return len(self.scheduler.waiting)

    def count_end(self) -> None:
        """Count a request that ended."""
        self._ends.append(time.monotonic())

    def estimated_wait(self, waiting: int) -> float:
        """Estimate the seconds until `waiting` requests are served, at the pace of the last ones; 1 to 60."""
        if len(self._ends) < 2:
            return 1.0
        pace = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        return min(max(1.0, pace * waiting), 60.0)


@dataclass(frozen=True, slots=True)
class GenerationStats(Stats):
    """The load of an engine that generates."""

    drafter: Drafter
    cache: Cache

    @property
    def kv_bytes(self) -> int:
        """Bytes of the running requests' keys and values; prefixes give way to them."""
        return self.cache.row_bytes

    @property
    def kv_budget(self) -> int:
        """Bytes that keys and values may take."""
        return self.cache.budget

    @property
    def prefix_queries(self) -> int:
        """Tokens looked up in the prefix cache."""
        return self.cache.prefixes.queries

    @property
    def prefix_hits(self) -> int:
        """Tokens found there."""
        return self.cache.prefixes.hits

    @property
    def drafts(self) -> int:
        """How often a request had draft tokens in a step."""
        return self.drafter.drafts

    @property
    def draft_tokens(self) -> int:
        """Tokens that were drafted."""
        return self.drafter.draft_tokens

    @property
    def accepted_tokens(self) -> int:
        """Draft tokens that became part of an answer."""
        return self.drafter.accepted_tokens
