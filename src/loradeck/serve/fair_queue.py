"""The waiting requests: deficit round-robin by tokens over adapters, and over tenants among those of one adapter.

A queue may go while it has credit. Tokens are charged when they are computed. When no queue that may go has credit
left, all are refilled. So the shares are equal in tokens, not in requests, and a queue with long answers waits while
the others catch up.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Generic, TypeVar

from loradeck.runner.request import Request

Name = TypeVar("Name", bound=Hashable)
Adapters = tuple[str, ...]  # without their weights: else a client could vary them for more turns


class Deficits(Generic[Name]):
    """The tokens that each name may still take. A new name begins with one quantum."""

    def __init__(self, quantum: int) -> None:
        self.quantum = quantum
        self._credit: dict[Name, int] = {}

    def charge(self, name: Name, tokens: int) -> None:
        """Take tokens off a name's credit."""
        self._credit[name] = self._credit.get(name, self.quantum) - tokens

    def first(self, names: Sequence[Name], eligible: Callable[[Name], bool] = lambda _: True) -> Name | None:
        """Return the first eligible name with credit.

        If none has credit, refill all names until the least indebted eligible one has some, and return it.
        """
        credit = {name: self._credit.get(name, self.quantum) for name in names}
        name = next((name for name in names if credit[name] > 0 and eligible(name)), None)
        if name is not None:
            return name
        debtors = sorted((name for name in names if credit[name] <= 0), key=credit.__getitem__, reverse=True)
        name = next((name for name in debtors if eligible(name)), None)
        if name is not None:
            rounds = -credit[name] // self.quantum + 1
            for other in names:
                self._credit[other] = min(credit[other] + rounds * self.quantum, self.quantum)
        return name

    def forget(self, name: Name) -> None:
        """Drop a name with its credit or debt."""
        self._credit.pop(name, None)


class FairQueue:
    """Waiting requests, next ones first."""

    def __init__(self, quantum: int) -> None:
        self.quantum = quantum
        self._queues: OrderedDict[Adapters, OrderedDict[str, deque[Request]]] = OrderedDict()
        self._deficits: Deficits[Adapters] = Deficits(quantum)
        self._tenants: dict[Adapters, Deficits[str]] = {}
        self._members: dict[Adapters, int] = {}  # waiting and running; a debt is forgotten with the last one
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Request]:
        return (request for tenants in self._queues.values() for queue in tenants.values() for request in queue)

    def push(self, request: Request, *, again: bool = False) -> None:
        """Add a request. One that waits `again` goes to the front of its queue, and its queue to the front."""
        name = _adapters(request)
        tenants = self._queues.setdefault(name, OrderedDict())
        queue = tenants.setdefault(request.tenant, deque())
        if again:
            queue.appendleft(request)
            tenants.move_to_end(request.tenant, last=False)
            self._queues.move_to_end(name, last=False)
        else:
            queue.append(request)
            self._members[name] = self._members.get(name, 0) + 1
        self._count += 1

    def heads(self) -> Iterator[Request]:
        """Yield the next request of each queue, in the order of the queues."""
        return (self._head(name) for name in [*self._queues])

    def pop(self, eligible: Callable[[Request], bool]) -> Request | None:
        """Remove and return the next eligible request."""
        name = self._deficits.first([*self._queues], lambda name: eligible(self._head(name)))
        if name is None:
            return None
        request = self._head(name)
        self.remove(request)
        if name in self._queues:
            self._queues.move_to_end(name)
            if request.tenant in self._queues[name]:
                self._queues[name].move_to_end(request.tenant)
        return request

    def remove(self, request: Request) -> None:
        """Remove a waiting request."""
        name = _adapters(request)
        tenants = self._queues[name]
        tenants[request.tenant].remove(request)
        self._count -= 1
        if not tenants[request.tenant]:
            del tenants[request.tenant]
        if not tenants:
            del self._queues[name]

    def charge(self, request: Request, tokens: int) -> None:
        """Charge a request's adapters and tenant for tokens that were computed."""
        name = _adapters(request)
        self._deficits.charge(name, tokens)
        self._tenants.setdefault(name, Deficits(self.quantum)).charge(request.tenant, tokens)

    def end(self, request: Request) -> None:
        """Count the end of a request that no longer waits."""
        name = _adapters(request)
        self._members[name] -= 1
        if not self._members[name]:
            del self._members[name]
            self._deficits.forget(name)
            self._tenants.pop(name, None)

    def _head(self, name: Adapters) -> Request:
        tenants = self._queues[name]
        if len(tenants) == 1:
            return next(iter(tenants.values()))[0]
        tenant = self._tenants.setdefault(name, Deficits(self.quantum)).first([*tenants])
        assert tenant is not None
        return tenants[tenant][0]


def _adapters(request: Request) -> Adapters:
    return tuple(sha256 for sha256, _ in request.key)
