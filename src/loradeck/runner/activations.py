"""What quantised matrices are multiplied with in the step (activations.h). Light to import, for the command line."""

from typing import Literal, TypeAlias

Activations: TypeAlias = Literal["auto", "int8", "plain"]
INT8: dict[Activations, bool | None] = {"auto": None, "int8": True, "plain": False}
"""int8: rounded to 8 bits; plain: as they are; auto: int8 on CPUs where that is faster."""
