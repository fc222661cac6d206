"""Whose turn it is among those that wait: deficit round-robin by tokens, over adapters, and within one over tenants.

A queue may go while it has credit. Tokens are taken off its credit when they are computed, and when no queue that is
able to go has credit left, all get the same again: so shares are equal in tokens, not in requests, and a queue that is
busy with long answers waits while others catch up. Knows requests' adapters and tenants only.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Generic, TypeVar

from loradeck.serve.request import Request

Name = TypeVar("Name", bound=Hashable)
Adapters = tuple[str, ...]  # whatever their weights: else who varies them would get more turns


class Deficits(Generic[Name]):
    """Tokens that each name may still take; one that is new begins with a quantum."""

    def __init__(self, quantum: int) -> None:
        self.quantum = quantum
        self._left: dict[Name, int] = {}

    def charge(self, name: Name, tokens: int) -> None:
        """Take tokens off a name's credit."""
        self._left[name] = self._left.get(name, self.quantum) - tokens

    def first(self, names: Sequence[Name], able: Callable[[Name], bool] = lambda _: True) -> Name | None:
        """Return the first of these names that has credit and is able.

        Where there is none, all get as many quanta as the able one with the most credit needs, and it is that one.
        """
        left = {name: self._left.get(name, self.quantum) for name in names}
        rich = next((name for name in names if left[name] > 0 and able(name)), None)
        if rich is not None:
            return rich
        poor = sorted((name for name in names if left[name] <= 0), key=left.__getitem__, reverse=True)
        found = next((name for name in poor if able(name)), None)
        if found is not None:
            rounds = -left[found] // self.quantum + 1
            for name in names:
                self._left[name] = min(left[name] + rounds * self.quantum, self.quantum)
        return found

    def forget(self, name: Name) -> None:
        """Let a name go, with its credit or its debt."""
        self._left.pop(name, None)


class FairQueue:
    """The requests that wait, in the order of their turns."""

    def __init__(self, quantum: int) -> None:
        self.quantum = quantum
        self._queues: OrderedDict[Adapters, OrderedDict[str, deque[Request]]] = OrderedDict()
        self._credits: Deficits[Adapters] = Deficits(quantum)
        self._tenants: dict[Adapters, Deficits[str]] = {}
        self._members: dict[Adapters, int] = {}  # waiting and running; without any, a debt is forgotten
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Request]:
        return (request for tenants in self._queues.values() for queue in tenants.values() for request in queue)

    def push(self, request: Request, *, again: bool = False) -> None:
        """Let a request wait; one that waits `again` goes before the others of its queue."""
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
        """Yield of each queue the request whose turn it is next, those first whose turn is first."""
        return (self._head(name) for name in [*self._queues])

    def next(self, able: Callable[[Request], bool]) -> Request | None:
        """Take out the request whose turn it is, of those that are able to go."""
        name = self._credits.first([*self._queues], lambda name: able(self._head(name)))
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
        """Take a waiting request out."""
        name = _adapters(request)
        tenants = self._queues[name]
        tenants[request.tenant].remove(request)
        self._count -= 1
        if not tenants[request.tenant]:
            del tenants[request.tenant]
        if not tenants:
            del self._queues[name]

    def charge(self, request: Request, tokens: int) -> None:
        """Count tokens that were computed for a request."""
        name = _adapters(request)
        self._credits.charge(name, tokens)
        self._tenants.setdefault(name, Deficits(self.quantum)).charge(request.tenant, tokens)

    def done(self, request: Request) -> None:
        """Say that a request, waiting no more, has ended."""
        name = _adapters(request)
        self._members[name] -= 1
        if not self._members[name]:
            del self._members[name]
            self._credits.forget(name)
            self._tenants.pop(name, None)

    def _head(self, name: Adapters) -> Request:
        tenants = self._queues[name]
        if len(tenants) == 1:
            return next(iter(tenants.values()))[0]
        tenant = self._tenants.setdefault(name, Deficits(self.quantum)).first([*tenants])
        assert tenant is not None
        return tenants[tenant][0]


def _adapters(request: Request) -> Adapters:
    return tuple(own for own, _ in request.key)
