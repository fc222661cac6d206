"""The matrices of a layer, in the order of adapters.h."""

from typing import Literal, TypeAlias

Slot: TypeAlias = Literal["q", "k", "v", "o", "gate", "up", "down"]
SLOTS: tuple[Slot, ...] = ("q", "k", "v", "o", "gate", "up", "down")
