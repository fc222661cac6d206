"""An adapter that takes memory. Knows where it is and who uses it; moves nothing."""

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal

from loradeck.errors import LoradeckError
from loradeck.lora.adapter import Adapter
from loradeck.stored import Stored

Tier = Literal["device", "memory", "disk"]


@dataclass(eq=False)
class Resident:
    """An adapter that takes memory, or is about to."""

    stored: Stored
    """By which version it was last loaded."""
    sha256: str
    tier: Tier
    last_used: float
    """In seconds since 1970."""
    pins: int = 0
    """Running requests that use it."""
    doomed: bool = False
    """To be given up as soon as nothing uses it."""
    parked: Adapter | None = None
    """Its tensors, in the tier memory."""
    loading: Future[LoradeckError | None] | None = None
    loaded_bytes: int | None = None
    """What its tensors take, once they are loaded: not always what they take on disk."""

    @property
    def spec(self) -> str:
        return self.stored.spec

    @property
    def nbytes(self) -> int:
        return self.stored.facts.nbytes if self.loaded_bytes is None else self.loaded_bytes

    @property
    def pinned(self) -> bool:
        return self.pins > 0

    @property
    def ready(self) -> bool:
        """Whether it can be used."""
        return self.tier == "device" and self.loading is None

    @property
    def idle(self) -> bool:
        """Whether it can leave the device."""
        return self.ready and not self.pins
