"""Decides which requests run next, within rows, tokens, and the memory of keys, values and adapters.

Running requests get their next token in every step; what is left of the step's tokens goes to prompts, in chunks, so
that a long prompt stalls nobody. Knows no tensors and no text.
"""

from collections.abc import Callable, Mapping
from itertools import islice
from typing import Protocol

from loradeck.serve.config import EngineConfig
from loradeck.serve.fair_queue import FairQueue
from loradeck.serve.request import Key, Request, Scheduled
from loradeck.stored import Stored

TRIES = 4  # adapters that are looked for in one step, so that thousands of requests that wait cost no time


class Rows(Protocol):
    """Memory for keys and values: `serve.cache.KVCache`."""

    def reserve(self, request: Request, tokens: int) -> bool:
        """Give a request room for so many tokens, if there is any."""
        ...

    def release(self, request: Request) -> None:
        """Take a request's room back."""
        ...


class Adapters(Protocol):
    """Memory for adapters: `serve.residency.AdapterCache`."""

    def ready(self, key: Key) -> bool:
        """Say whether all of a key's adapters can be used."""
        ...

    def fetch(self, found: list[tuple[str, Stored]], *, spare: Callable[[str], bool]) -> bool:
        """Begin to load what is missing, if there is room."""
        ...

    def pin(self, key: Key) -> bool:
        """Keep a key's adapters, and say whether they are there."""
        ...

    def unpin(self, key: Key) -> None:
        """Let them go."""
        ...


class Scheduler:
    """The requests of an engine: those that wait, and those that run."""

    def __init__(self, config: EngineConfig, rows: Rows, adapters: Adapters) -> None:
        self.config = config
        self.rows = rows
        self.adapters = adapters
        self.waiting = FairQueue(config.quantum)
        self.running: list[Request] = []
        """In the order of their admission."""
        self._found: dict[Request, Mapping[str, Stored]] = {}
        self._tries = 0

    def add(self, request: Request, found: Mapping[str, Stored]) -> None:
        """Let a request wait for its turn; `found` are its adapters on disk."""
        self._found[request] = found
        self.waiting.push(request)

    def next(self, now: float) -> list[Scheduled]:
        """Return what the next step computes; `now` is time.monotonic()."""
        before = [*self.running]
        batch = [Scheduled(request, 1) for request in before if request.pending == 1 and self._reserve(request, 1)]
        left = self.config.max_step_tokens - len(batch)
        for request in [request for request in before if request.pending > 1]:
            count = min(left, request.pending)
            if count and self._reserve(request, count):
                batch.append(Scheduled(request, count))
                left -= count
        if self.running != before:  # some gave way to others: no room for newcomers
            return [work for work in batch if work.request in self.running]
        self._look_ahead()
        while left > 0 and len(self.running) < self.config.max_rows:
            request = self._admit(now)
            if request is None:
                break
            count = min(left, request.pending)
            batch.append(Scheduled(request, count))
            left -= count
        return batch

    def done(self, work: Scheduled) -> None:
        """Count a step's work on a request."""
        work.request.computed += work.count
        self.waiting.charge(work.request, work.count)

    def end(self, request: Request) -> None:
        """Let a request go, wherever it is, with all that it holds."""
        if request in self.running:
            self._stop(request)
        else:
            self.waiting.remove(request)
        self.waiting.done(request)
        del self._found[request]

    # ---- coming in

    def _admit(self, now: float) -> Request | None:
        request = self.waiting.next(self._able(now))
        if request is None:
            return None
        pinned = self.adapters.pin(request.key)  # not if it was unloaded by hand just now
        if not pinned or not self.rows.reserve(request, request.pending):
            if pinned:
                self.adapters.unpin(request.key)
            self.waiting.push(request, again=True)  # it is the next one; smaller ones do not go before it
            return None
        self.running.append(request)
        request.admitted = request.admitted or now
        return request

    def _able(self, now: float) -> Callable[[Request], bool]:
        """Return a test for requests that may run now."""
        late = [head for head in self.waiting.heads() if now - head.arrived > self.config.patience]
        lacking = min((head for head in late if not self._is_ready(head)), key=lambda head: head.arrived, default=None)
        if lacking is not None:
            # Once loaded, an adapter stays for what came within patience of the next one's first: no thrashing.
            turn = lacking.arrived + self.config.patience
            here = [head for head in late if head.arrived <= turn and self._is_ready(head)]
            kept = {own for head in here for own, _ in head.key}
            if not self._prepare(lacking, spare=kept.__contains__):
                # What runs must end first. Nobody else comes in that would use the memory it waits for.
                return lambda request: request in here or not request.key
        wanted = self._wanted()
        return lambda request: self._is_ready(request) or (self._try(request, wanted) and self._is_ready(request))

    def _wanted(self) -> Callable[[str], bool]:
        """Return a test for adapters that somebody waits for: they are used before they give way."""
        wanted: set[str] | None = None

        def spare(sha256: str) -> bool:
            nonlocal wanted
            if wanted is None:
                wanted = {own for head in self.waiting.heads() for own, _ in head.key}
            return sha256 in wanted

        return spare

    def _look_ahead(self) -> None:
        """Begin to load for those whose turn is next, while all rows are taken."""
        self._tries = 0
        for head in islice(self.waiting.heads(), TRIES):
            if not self._is_ready(head):
                self._prepare(head, spare=self._wanted())

    def _prepare(self, request: Request, *, spare: Callable[[str], bool]) -> bool:
        """See to it that a request's adapters are there, or on their way; say whether there is room for them."""
        return self.adapters.fetch([*self._found[request].items()], spare=spare)

    def _try(self, request: Request, spare: Callable[[str], bool]) -> bool:
        self._tries += 1
        return self._tries <= TRIES and self._prepare(request, spare=spare)

    def _is_ready(self, request: Request) -> bool:
        return self.adapters.ready(request.key)

    # ---- giving way

    def _reserve(self, request: Request, count: int) -> bool:
        """Make room for a running request's next tokens, if need be by letting those that came last wait again."""
        while request in self.running:
            if self.rows.reserve(request, request.computed + count):
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
