"""What a client calls a model: the base, an adapter, a version, a blend. Knows names and weights; asks no disk.

poet · smollm2-135m:poet · poet@2 · poet*0.7+pirate*0.3 · "" or the base's own name: the base alone
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loradeck.api.errors import HttpError
from loradeck.api.llamacpp_ids import LlamacppIds
from loradeck.api.requests import Generation, Scale

if TYPE_CHECKING:
    from loradeck.base.load import Base
    from loradeck.lora.routing import RouteEntry

MAX_BLEND = 64  # each of its adapters is looked for on disk


@dataclass(frozen=True, slots=True)
class Chosen:
    """Adapters by the names a client gave, name or name@version, with their weights."""

    weights: tuple[tuple[str, float], ...]

    @property
    def entry(self) -> "RouteEntry":
        """What an engine takes."""
        return dict(self.weights) or None

    @property
    def names(self) -> list[str]:
        """The adapters' names, without versions."""
        return [spec.partition("@")[0] for spec, _ in self.weights]

    @property
    def label(self) -> str:
        """What the engine's requests are called by."""
        return "+".join(spec if weight == 1 else f"{spec}*{weight:g}" for spec, weight in self.weights)


BASE = Chosen(())


class ModelNames:
    """Reads the three ways in which a request may name adapters."""

    def __init__(self, base: "Base", numbering: LlamacppIds) -> None:
        self.base = base.name
        self._own = {base.name, base.source}
        self._numbering = numbering

    def choose(self, request: Generation) -> Chosen:
        """Return which adapters a request is for. It asks the disk only for llama.cpp's numbers.

        Raises:
            HttpError: 400 for what is no blend, or for two fields that name different adapters; 404 for a number that
                no adapter has.
        """
        said = {"model": self.parse(request.model or "", "model")}
        if request.adapter_id is not None:
            said["adapter_id"] = self.parse(request.adapter_id, "adapter_id")
        if request.lora is not None:
            said["lora"] = self._numbered(request.lora)
        named = {field: chosen for field, chosen in said.items() if chosen != BASE}
        if len(set(named.values())) > 1:
            fields = " and ".join(named)
            raise HttpError(400, f"{fields} name different adapters; name them in one.", param=[*named][-1])
        if len(said) == 1 and not request.model:
            return blend([*self._numbering.scales.items()], "lora")
        return next(iter(named.values()), BASE)

    def parse(self, text: str, param: str = "model") -> Chosen:
        """Return the adapters that a name stands for.

        Raises:
            HttpError: 400, it is no blend.
        """
        own = next((name for name in self._own if text.startswith(f"{name}:")), None)
        rest = text if own is None else text[len(own) + 1 :]
        if not rest or (own is None and rest in self._own):
            return BASE
        return blend([_part(text, part.strip(), param) for part in rest.split("+")], param)

    def _numbered(self, scales: Sequence[Scale]) -> Chosen:
        used = [scale for scale in scales if scale.scale]
        return blend([(self._numbering.name(scale.id), scale.scale) for scale in used], "lora")


def blend(parts: Sequence[tuple[str, float]], param: str) -> Chosen:
    """Return the adapters of a blend; one that is named twice counts twice.

    Raises:
        HttpError: 400, it has too many, or a weight that is no weight.
    """
    weights: dict[str, float] = {}
    for name, weight in parts:
        weights[name] = weights.get(name, 0.0) + weight
        if not math.isfinite(weights[name]):
            raise HttpError(400, f"The weight of {name[:128]!r} is not finite.", param=param)
    if len(weights) > MAX_BLEND:
        raise HttpError(400, f"A blend of {len(weights)} adapters; {MAX_BLEND} are allowed.", param=param)
    return Chosen(tuple(sorted(weights.items())))


def _part(text: str, part: str, param: str) -> tuple[str, float]:
    name, star, weight = part.rpartition("*")
    name, weight = (name, weight) if star else (part, "1")
    try:
        if name.partition("@")[0]:
            return name, float(weight)
    except ValueError:
        pass
    hint = "Write it as in poet*0.7+pirate*0.3."
    raise HttpError(400, f"{text[:128]!r} is no model: {part[:128]!r} is not NAME*WEIGHT.", param=param, hint=hint)
