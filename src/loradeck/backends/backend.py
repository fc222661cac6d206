"""What a store asks of the place where its versions lie."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from loradeck.errors import LoradeckError
from loradeck.stored import Stored


class Backend(Protocol):
    """A place for versions. Any number of threads and processes may use it at the same time."""

    location: str
    """The folder or URL, for messages."""
    folder: Path
    """A folder on this machine, for what is not published yet."""

    def catalogue(self) -> dict[str, list[int]]:
        """Return the numbers of every adapter's versions, in any order, by name, including invalid names."""
        ...

    def versions(self, name: str) -> list[int]:
        """Return the numbers of an adapter's versions, sorted; [] if there is none."""
        ...

    def has(self, name: str, number: int) -> bool:
        """Return whether a version is there, usable or not."""
        ...

    def read(self, name: str, number: int) -> Stored:
        """Return a version, whose files are on this machine then.

        Raises:
            AdapterError: it is unusable, or was removed.
        """
        ...

    def listed(self, specs: Iterable[tuple[str, int]]) -> dict[tuple[str, int], Stored | LoradeckError]:
        """Return versions for a listing, or why they are unusable; files that are elsewhere stay there."""
        ...

    def publish(self, name: str, source: Path) -> Stored:
        """Make a copy of a PEFT folder the next version of a name.

        Raises:
            AdapterError, UnsupportedError: it cannot be loaded.
            OSError: the store cannot be changed.
        """
        ...

    def remove(self, name: str, numbers: Sequence[int]) -> None:
        """Remove versions, in this order.

        Raises:
            OSError: the store cannot be changed.
        """
        ...

    def path(self, name: str, number: int) -> Path:
        """Return the folder of a version on this machine, whether it is there or not."""
        ...
