"""A name in a store as an argument, STORE/NAME: the store is a folder or a URL."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from loradeck.errors import ConfigError, LoradeckError
from loradeck.store import AdapterStore, is_store, is_url
from loradeck.stored import Stored


@dataclass(frozen=True)
class StoreName:
    """A store and a name in it, which may have a version: poet, or poet@2."""

    store: AdapterStore
    name: str
    place: str
    """The store as it was typed."""

    @classmethod
    def of(cls, text: str) -> Self:
        """Open the store of STORE/NAME.

        Raises:
            ConfigError: the text has no store, or no name in it.
        """
        place, _, name = text.rstrip("/").rpartition("/")
        if is_url(text):
            is_name = is_url(f"{place}/") and bool(place.partition("://")[2])
        else:
            place, name = str(Path(text).parent), Path(text).name
            is_name = bool(name) and "/" in text.rstrip("/") and not is_store(Path(text))
        if not is_name:
            raise ConfigError(
                f"{text} does not name an adapter in a store", hint="Give STORE/NAME, as in adapters/poet."
            )
        return cls(AdapterStore(place), name, place)

    def shown(self, number: int) -> str:
        """Return the folder or URL of a version as it is typed."""
        folder = self.store.path(self.name, number).name
        return f"{self.place}/{folder}" if is_url(self.place) else str(Path(self.place) / folder)

    def publish_new(self, source: Stored) -> tuple[Stored, bool]:
        """Publish an adapter unless it is the latest version already; return that version, and whether it is new.

        Raises:
            LoradeckError: it cannot be published.
        """
        latest = None
        with suppress(LoradeckError):  # there is none yet, or it is unusable
            latest = self.store.find(self.name)
        if latest is not None and latest.equals(source):
            return latest, False
        return self.store.publish(self.name, source.path), True
