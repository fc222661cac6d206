"""The last few results of a costly check, found again by an equal question. Knows nothing of what it keeps."""

from collections.abc import Callable
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Memo(Generic[K, V]):
    """Adapters come in few shapes: checking 420 names again at each load would take longer than reading the file.

    What is kept is shared between all who asked, so it must not be written to.
    """

    def __init__(self, size: int = 8) -> None:
        self.size = size
        self._kept: tuple[tuple[K, V], ...] = ()

    def get(self, question: K, answer: Callable[[], V]) -> V:
        """Return the kept answer to an equal question, else `answer()`. An error is not kept."""
        for known, kept in self._kept:
            if known == question:
                return kept
        found = answer()
        self._kept = ((question, found), *self._kept[: self.size - 1])  # one assignment, so threads need no lock
        return found

    def clear(self) -> None:
        """Forget all."""
        self._kept = ()
