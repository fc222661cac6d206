"""The text of a blend of adapters: `poet`, `poet*0.5`, `poet*0.7+pirate*0.3`."""

import math
from collections.abc import Iterable

from loradeck.errors import ConfigError


def parse_blend(text: str) -> list[tuple[str, float]]:
    """Return a blend's (name, weight) pairs, in the order of the text; a name without a weight has weight 1.

    Raises:
        ConfigError: a part has no name, or its weight is not a finite number.
    """
    return [_parse_part(text, part.strip()) for part in text.split("+")]


def format_blend(weights: Iterable[tuple[str, float]]) -> str:
    """Return the text of (name, weight) pairs; `parse_blend` reads back the same numbers."""
    return "+".join(name if weight == 1 else f"{name}*{_format_weight(weight)}" for name, weight in weights)


def _parse_part(text: str, part: str) -> tuple[str, float]:
    name, star, number = part.rpartition("*")
    if not star:
        name, number = part, "1"
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not name or not math.isfinite(weight):
        raise ConfigError(
            f"invalid blend {text[:128]!r}: {part[:128]!r} is not NAME or NAME*WEIGHT",
            hint="Write a blend as in poet*0.7+pirate*0.3.",
        )
    return name, weight


def _format_weight(weight: float) -> str:
    return repr(float(weight)).removesuffix(".0").replace("e+", "e")  # "+" separates the parts
