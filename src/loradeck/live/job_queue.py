"""Which jobs train at once, and which is next: within bytes, and fair to their owners."""

from dataclasses import dataclass

from loradeck.serve.fair_queue import Deficits

QUANTUM = 100_000  # tokens that an owner's jobs may take before the others' turn


@dataclass(frozen=True, slots=True)
class Ticket:
    """What a job asks for."""

    id: str
    owner: str
    nbytes: int
    """Of memory while it trains."""
    tokens: int
    """That it will train on."""


class JobQueue:
    """The jobs that wait and those that train.

    The next job is the oldest one of the owner whose turn it is, by deficit round-robin in tokens; of owners with
    credit, the one whose last job began longest ago. If it does not fit beside those that train, it waits until it
    does, and the others wait with it: else a large one might wait forever.
    """

    def __init__(self, budget: int) -> None:
        """`budget` is in bytes of memory."""
        self.budget = budget
        self._waiting: dict[str, Ticket] = {}
        self._training: dict[str, Ticket] = {}
        self._deficits: Deficits[str] = Deficits(QUANTUM)
        self._turns: dict[str, int] = {}
        """Of each owner: the number of the admission that was its last."""
        self._admissions = 0

    def __contains__(self, id: str) -> bool:
        return id in self._waiting or id in self._training

    def trains(self, id: str) -> bool:
        """Return whether a job was admitted."""
        return id in self._training

    @property
    def waiting(self) -> int:
        """How many jobs wait."""
        return len(self._waiting)

    @property
    def training(self) -> int:
        """How many jobs train."""
        return len(self._training)

    def add(self, ticket: Ticket) -> None:
        """Let a job wait."""
        self._waiting[ticket.id] = ticket

    def remove(self, id: str) -> None:
        """Forget a job that waits, or that trains no more."""
        ticket = self._waiting.pop(id, None) or self._training.pop(id, None)
        tickets = (*self._waiting.values(), *self._training.values())
        if ticket is not None and all(other.owner != ticket.owner for other in tickets):
            self._deficits.forget(ticket.owner)
            self._turns.pop(ticket.owner, None)

    def admit(self) -> list[str]:
        """Return the jobs that train from now on."""
        ids: list[str] = []
        while self._waiting:
            oldest: dict[str, Ticket] = {}
            for ticket in self._waiting.values():
                oldest.setdefault(ticket.owner, ticket)
            owner = self._deficits.first(sorted(oldest, key=lambda owner: self._turns.get(owner, 0)))
            assert owner is not None
            ticket = oldest[owner]
            if self._training and sum(other.nbytes for other in self._training.values()) + ticket.nbytes > self.budget:
                break
            del self._waiting[ticket.id]
            self._training[ticket.id] = ticket
            self._deficits.charge(owner, ticket.tokens)
            self._admissions += 1
            self._turns[owner] = self._admissions
            ids.append(ticket.id)
        return ids
