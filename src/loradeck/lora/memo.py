"""A memo of the last few results of a costly function, for arguments that cannot be hashed."""

from collections.abc import Callable
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Memo(Generic[K, V]):
    """The last results, by equality of their keys.

    Adapters come in few shapes, and checking 420 names at each load would take longer than reading the file. Results
    are shared between callers, so they must not be modified.
    """

    def __init__(self, size: int = 8) -> None:
        self.size = size
        self._results: tuple[tuple[K, V], ...] = ()

    def get(self, key: K, compute: Callable[[], V]) -> V:
        """Return the result for an equal key, else `compute()`; an exception is not remembered."""
        for other, result in self._results:
            if other == key:
                return result
        result = compute()
        self._results = ((key, result), *self._results[: self.size - 1])  # one assignment, so threads need no lock
        return result

    def clear(self) -> None:
        """Forget all results."""
        self._results = ()
