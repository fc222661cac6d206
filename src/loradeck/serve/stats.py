"""How full an engine is, for whoever asks. Knows counts only."""

import time
from collections import deque
from dataclasses import dataclass, field

from loradeck.serve.kv_cache import KVCache
from loradeck.serve.request import Request
from loradeck.serve.scheduler import Scheduler

RECENT = 64  # requests from whose ends the pace is told


@dataclass(frozen=True, slots=True)
class Stats:
    """An engine's numbers now."""

    scheduler: Scheduler
    cache: KVCache
    _ends: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))

    @property
    def running(self) -> int:
        """Requests that have a row."""
        return len(self.scheduler.running)

    @property
    def waiting(self) -> int:
        """Requests that have none yet."""
        return len(self.scheduler.waiting)

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values that running requests hold; prefixes give way to them."""
        return self.cache.row_bytes

    @property
    def kv_budget(self) -> int:
        """Bytes that keys and values may take."""
        return self.cache.budget

    @property
    def prefix_queries(self) -> int:
        """Tokens that were looked for in the prefix cache."""
        return self.cache.prefixes.queries

    @property
    def prefix_hits(self) -> int:
        """Tokens that were found there."""
        return self.cache.prefixes.hits

    def ended(self, _: Request) -> None:
        """Count the end of a request."""
        self._ends.append(time.monotonic())

    def wait(self, waiting: int) -> float:
        """Return the seconds after which so many requests will have had their turn, at the pace of the last ones."""
        if len(self._ends) < 2:
            return 1.0
        pace = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        return min(max(1.0, pace * waiting), 60.0)
