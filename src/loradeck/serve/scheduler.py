"""Decides which requests run next, within the limits of rows, tokens, KV cache and adapters.

Each running request gets its next token in every step. The rest of the step's tokens goes to prompts, in chunks, so
that a long prompt stalls nobody.
"""

from collections.abc import Callable, Mapping
from itertools import islice
from typing import Protocol

from loradeck.runner.request import Key, Request, Scheduled
from loradeck.serve.config import EngineConfig
from loradeck.serve.fair_queue import FairQueue
from loradeck.stored import Stored

ATTEMPTS = 4  # loads tried in one step, so that thousands of waiting requests cost no time


class Rows(Protocol):
    """Memory for keys and values: `runner.interface.Cache`."""

    def reserve(self, request: Request, tokens: int) -> bool:
        """Make room for this many tokens of a request, not more; False if there is none."""
        ...

    def release(self, request: Request) -> None:
        """Take a request's room back."""
        ...


class Adapters(Protocol):
    """Memory for adapters: `serve.adapter_cache.AdapterCache`."""

    def ready(self, key: Key) -> bool:
        """Return whether all adapters of a key can be used."""
        ...

    def fetch(self, adapters: Mapping[str, Stored], *, keep: Callable[[str], bool]) -> bool:
        """Start to load those that are missing; False if there is no room."""
        ...

    def pin(self, key: Key) -> bool:
        """Keep a key's adapters on the device; False if they are not there."""
        ...

    def unpin(self, key: Key) -> None:
        """Undo one `pin`."""
        ...


class Scheduler:
    """The waiting and the running requests of an engine."""

    def __init__(self, config: EngineConfig, rows: Rows, adapters: Adapters) -> None:
        self.config = config
        self.rows = rows
        self.adapters = adapters
        self.waiting = FairQueue(config.quantum)
        self.running: list[Request] = []
        """In the order of their admission."""
        self._stored: dict[Request, Mapping[str, Stored]] = {}
        self._attempts = 0

    def add(self, request: Request, adapters: Mapping[str, Stored]) -> None:
        """Queue a request with its adapters on disk, by content hash."""
        self._stored[request] = adapters
        self.waiting.push(request)

    def schedule(self, now: float) -> list[Scheduled]:
        """Return what the next step computes. `now` is time.monotonic()."""
        before = [*self.running]
        batch = [Scheduled(request, 1) for request in before if request.pending == 1 and self._reserve(request)]
        left = self.config.max_step_tokens - len(batch)
        for request in [request for request in before if request.pending > 1]:
            count = min(left, request.pending)
            if count and self._reserve(request):
                batch.append(Scheduled(request, count))
                left -= count
        if self.running != before:  # some were preempted: there is no room for new ones
            return [work for work in batch if work.request in self.running]
        self._load_ahead()
        while left > 0 and len(self.running) < self.config.max_rows:
            request = self._admit(now)
            if request is None:
                break
            count = min(left, request.pending)
            batch.append(Scheduled(request, count))
            left -= count
        return batch

    def advance(self, request: Request, tokens: int) -> None:
        """Record that a step computed a request's next tokens. Drafts count once they are accepted."""
        request.computed += tokens
        self.waiting.charge(request, tokens)

    def end(self, request: Request) -> None:
        """Remove a request, waiting or running, and free all that it holds."""
        if request in self.running:
            self._stop(request)
        else:
            self.waiting.remove(request)
        self.waiting.end(request)
        del self._stored[request]

    # ---- admission

    def _admit(self, now: float) -> Request | None:
        request = self.waiting.pop(self._eligible(now))
        if request is None:
            return None
        pinned = self.adapters.pin(request.key)  # fails if an adapter was unloaded by hand just now
        if not pinned or not self.rows.reserve(request, request.pending):
            if pinned:
                self.adapters.unpin(request.key)
            self.waiting.push(request, again=True)  # it stays the next one; smaller requests do not overtake it
            return None
        self.running.append(request)
        request.admitted = request.admitted or now
        return request

    def _eligible(self, now: float) -> Callable[[Request], bool]:
        """Return a test for requests that may run now."""
        late = [head for head in self.waiting.heads() if now - head.arrived > self.config.patience]
        blocked = min((head for head in late if not self._is_ready(head)), key=lambda head: head.arrived, default=None)
        if blocked is not None:
            # Resident adapters stay for requests that arrived within `patience` of the blocked one: no thrashing.
            deadline = blocked.arrived + self.config.patience
            first = [head for head in late if head.arrived <= deadline and self._is_ready(head)]
            needed = {sha256 for head in first for sha256, _ in head.key}
            if not self._load(blocked, keep=needed.__contains__):
                # Running requests must end first. Nobody else comes in who would use the memory it waits for.
                return lambda request: request in first or not request.key
        keep = self._awaited()
        return lambda request: self._is_ready(request) or (self._try_load(request, keep) and self._is_ready(request))

    def _awaited(self) -> Callable[[str], bool]:
        """Return a test for adapters of waiting requests: these are used before they are evicted."""
        adapters: set[str] | None = None

        def awaited(sha256: str) -> bool:
            nonlocal adapters
            if adapters is None:
                adapters = {sha256 for head in self.waiting.heads() for sha256, _ in head.key}
            return sha256 in adapters

        return awaited

    def _load_ahead(self) -> None:
        """Start to load the adapters of the next requests, even if all rows are taken."""
        self._attempts = 0
        for head in islice(self.waiting.heads(), ATTEMPTS):
            if not self._is_ready(head):
                self._load(head, keep=self._awaited())

    def _load(self, request: Request, *, keep: Callable[[str], bool]) -> bool:
        """Start to load a request's adapters unless they are there; False if there is no room."""
        return self.adapters.fetch(self._stored[request], keep=keep)

    def _try_load(self, request: Request, keep: Callable[[str], bool]) -> bool:
        self._attempts += 1
        return self._attempts <= ATTEMPTS and self._load(request, keep=keep)

    def _is_ready(self, request: Request) -> bool:
        return self.adapters.ready(request.key)

    # ---- preemption

    def _reserve(self, request: Request) -> bool:
        """Make room for a running request's tokens, if necessary by preempting the last admitted ones."""
        while request in self.running:
            if self.rows.reserve(request, len(request.tokens)):
                return True
            last = self.running[-1]
            self._stop(last)
            last.computed = 0
            self.waiting.push(last, again=True)
        return False

    def _stop(self, request: Request) -> None:
        self.rows.release(request)
        self.running.remove(request)
        self.adapters.unpin(request.key)
