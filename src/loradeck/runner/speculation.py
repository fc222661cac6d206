"""Speculative decoding: tokens that may come next in a row, to be computed in the step that checks them.

A row's next token and the drafts after it are one chunk. Each draft that is what would have been chosen anyway saves a
step; the others cost a little time and change nothing.
"""

from collections.abc import Sequence

LONGEST, SHORTEST = 4, 2  # tokens of the n-grams that are looked up
MEMORY_BOUND = 16
"""Tokens of a step. With fewer, a step's time is mostly that of reading the weights, and drafts are nearly free: one of
16 tokens takes about twice as long as one of a single token. With more, a draft takes as long as any other token."""
MAX_DRAFTS = MEMORY_BOUND - 1  # of a row in a step
FIRST_RATE = 0.75
WEIGHT = 0.25  # of a draft in the rate
RETRY = 1 / 1024  # of the way back to the first rate, for each step whose drafts were not worth it


class PromptLookup:
    """Drafts from a text itself: what followed the last time that its last tokens occurred."""

    def __init__(self) -> None:
        self._places: dict[tuple[int, ...], int] = {}
        """Where the token lies that followed each n-gram the last time."""
        self._read = 0

    def propose(self, text: Sequence[int], count: int) -> list[int]:
        """Return `count` tokens that may follow a text, or none; between two calls it may only grow."""
        if count < 1:
            return []
        self._index(text)
        for n in range(LONGEST, SHORTEST - 1, -1):
            place = self._places.get(tuple(text[-n:]))
            if place is not None:
                return _copy(text, place, count)
        return []

    def _index(self, text: Sequence[int]) -> None:
        for place in range(max(self._read, SHORTEST), len(text)):
            for n in range(SHORTEST, min(LONGEST, place) + 1):
                self._places[tuple(text[place - n : place])] = place
        self._read = len(text)


class Acceptance:
    """How often a row's drafts were right, lately.

    Attributes:
        rate: an estimate of the probability that the next draft is accepted.
        cost: of a draft, in steps.
    """

    def __init__(self, cost: float = 0.0) -> None:
        self.rate, self.cost = FIRST_RATE, cost

    def record(self, drafts: int, accepted: int) -> None:
        """Learn from a step in which the first `accepted` drafts were right; after a wrong one, none is looked at."""
        for place in range(min(drafts, accepted + 1)):
            self.rate += WEIGHT * ((place < accepted) - self.rate)

    def skip(self) -> None:
        """Learn that no draft was tried, so that one is tried again some time."""
        self.rate += RETRY * (FIRST_RATE - self.rate)


def draft_counts(
    acceptances: Sequence[Acceptance], limits: Sequence[int], tokens: int, max_tokens: int = MEMORY_BOUND
) -> list[int]:
    """Return how many drafts of each row to compute in a step that has so many tokens without them.

    A draft at place i of a row is right with the probability rate ** i. The likeliest come first, and each must be
    likelier than its cost and the share of MEMORY_BOUND that the step already has.

    Args:
        acceptances: Of each row's drafts.
        limits: Each row's drafts at most.
        tokens: The step's, without drafts.
        max_tokens: The step's at most.
    """
    drafts = sorted(
        (acceptance.cost - acceptance.rate**place, place, row)
        for row, (acceptance, limit) in enumerate(zip(acceptances, limits, strict=True))
        for place in range(1, limit + 1)
    )
    counts = [0] * len(limits)
    for total, (loss, _, row) in enumerate(drafts[: max(0, max_tokens - tokens)], start=tokens):
        if -loss <= total / MEMORY_BOUND:
            break
        counts[row] += 1
    for acceptance, limit, count in zip(acceptances, limits, counts, strict=True):
        if limit and not count:
            acceptance.skip()
    return counts


def _copy(text: Sequence[int], place: int, count: int) -> list[int]:
    """Return what lies in a text from `place` on, and go on with the copy where the text ends."""
    distance = len(text) - place
    copy: list[int] = [*text[place : place + count]]
    while len(copy) < count:
        copy.append(copy[-distance])
    return copy
