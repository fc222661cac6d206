"""llama.cpp's view of a store: every adapter has a number, and a scale for requests that name no model.

A name keeps its number as long as the process lives, whatever is published or removed.
"""

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

from loradeck.api.errors import HttpError

if TYPE_CHECKING:
    from loradeck.store import AdapterStore


class LlamacppIds:
    """The numbers and scales of one store's adapters. Any thread may ask; `names` and `name` ask the disk."""

    def __init__(self, store: "AdapterStore | None") -> None:
        self._store = store
        self._lock = threading.Lock()
        self._names: list[str] = []
        self._scales: dict[str, float] = {}

    def names(self) -> dict[int, str]:
        """Return the adapters there are now, by number."""
        there = self._store.names() if self._store else []
        with self._lock:
            known = set(self._names)
            self._names += [name for name in there if name not in known]
            present = set(there)
            return {number: name for number, name in enumerate(self._names) if name in present}

    def name(self, number: int) -> str:
        """Return the adapter that has a number.

        Raises:
            HttpError: 404, none has it.
        """
        names = self.names()
        if number not in names:
            raise HttpError(404, f"No adapter has the number {number}; GET /lora-adapters lists them.", param="lora")
        return names[number]

    @property
    def scales(self) -> dict[str, float]:
        """The scales above 0, or below, by name."""
        return dict(self._scales)

    def rescale(self, scales: Mapping[str, float]) -> None:
        """Replace all scales: an adapter that is not listed has none."""
        self._scales = {name: scale for name, scale in scales.items() if scale}
