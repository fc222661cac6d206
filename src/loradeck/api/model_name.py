"""How clients name adapters: names and versions, blends, and llama.cpp's ids.

`poet` · `smollm2-135m:poet` · `poet@2` · `poet*0.7+pirate*0.3` · "" or the base's name: the base alone
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loradeck.api.errors import HttpError, invalid_field
from loradeck.api.requests import MAX_BLEND, MAX_WEIGHT, AdapterRequest, LoraScale
from loradeck.blend import format_blend, parse_blend

if TYPE_CHECKING:
    from loradeck.base.load import Base
    from loradeck.lora.routing import RouteEntry
    from loradeck.store import AdapterStore


@dataclass(frozen=True, slots=True)
class AdapterSelection:
    """The adapters of a request, as (name or name@version, weight); none for the base alone."""

    weights: tuple[tuple[str, float], ...] = ()

    @property
    def entry(self) -> "RouteEntry":
        """The selection as an engine takes it."""
        return dict(self.weights) or None

    @property
    def names(self) -> list[str]:
        """The adapters' names, without versions."""
        return [spec.partition("@")[0] for spec, _ in self.weights]

    @property
    def label(self) -> str:
        """The selection as text, for logs and metrics."""
        return format_blend(self.weights)


BASE = AdapterSelection()


class AdapterIds:
    """llama.cpp's view of a store: every adapter has an id, and a scale for requests that name no model.

    A name keeps its id for the life of the process, whatever is published or removed. Thread-safe; `names` and `name`
    read the disk.
    """

    def __init__(self, store: "AdapterStore | None") -> None:
        self._store = store
        self._lock = threading.Lock()
        self._names: list[str] = []
        self._scales: dict[str, float] = {}

    def names(self) -> dict[int, str]:
        """Return the adapters in the store by id."""
        stored = set(self._store.names() if self._store else ())
        with self._lock:
            self._names += sorted(stored.difference(self._names))
            return {number: name for number, name in enumerate(self._names) if name in stored}

    def name(self, number: int) -> str:
        """Return the adapter with an id.

        Raises:
            HttpError: 404, there is none.
        """
        names = self.names()
        if number not in names:
            raise HttpError(404, f"Unknown adapter id {number}; GET /lora-adapters lists them.", param="lora")
        return names[number]

    @property
    def scales(self) -> dict[str, float]:
        """The scales that are not 0, by name."""
        return dict(self._scales)

    def set_scales(self, scales: Mapping[str, float]) -> None:
        """Replace all scales; an adapter that is not listed gets 0."""
        self._scales = {name: scale for name, scale in scales.items() if scale}

    def forget(self, name: str) -> None:
        """Leave an adapter that was removed out of the scales."""
        self.set_scales({other: scale for other, scale in self._scales.items() if other != name})


class ModelNames:
    """Reads the names that a server's requests may use."""

    def __init__(self, base: "Base", ids: AdapterIds) -> None:
        self.base = base.name
        self._aliases = sorted({base.name, base.source}, key=len, reverse=True)  # one may begin as another does
        self._ids = ids

    def select(self, request: AdapterRequest) -> AdapterSelection:
        """Return the adapters that a request selects by `model`, `adapter_id` or `lora`. Reads the disk for `lora`.

        Raises:
            HttpError: 400, an invalid blend, or fields that select different adapters; 404, an unknown id.
        """
        fields = {"model": self.parse(request.model or "", "model")}
        if request.adapter_id is not None:
            fields["adapter_id"] = self.parse(request.adapter_id, "adapter_id")
        if request.lora is not None:
            fields["lora"] = self._by_id(request.lora)
        selections = {field: selection for field, selection in fields.items() if selection != BASE}
        if len(set(selections.values())) > 1:
            *_, last = selections
            raise HttpError(400, f"{' and '.join(selections)} select different adapters; set only one.", param=last)
        return next(iter(selections.values()), BASE) if len(fields) > 1 else self.named(request.model)

    def named(self, model: str | None) -> AdapterSelection:
        """Return the adapters of the field `model`; without a name, those that llama.cpp's scales select.

        Raises:
            HttpError: 400, an invalid blend.
        """
        return self.parse(model) if model else _blend([*self._ids.scales.items()], "lora")

    def parse(self, text: str, param: str = "model") -> AdapterSelection:
        """Return the adapters that a name stands for.

        Raises:
            HttpError: 400, an invalid blend.
        """
        if text in self._aliases:
            return BASE
        alias = next((alias for alias in self._aliases if text.startswith(f"{alias}:")), None)
        adapters = text if alias is None else text.removeprefix(f"{alias}:")
        if not adapters:
            return BASE
        with invalid_field(param):
            parts = parse_blend(adapters)
        return _blend(parts, param)

    def _by_id(self, scales: Sequence[LoraScale]) -> AdapterSelection:
        return _blend([(self._ids.name(scale.id), scale.scale) for scale in scales if scale.scale], "lora")


def _blend(parts: Sequence[tuple[str, float]], param: str) -> AdapterSelection:
    """Return the selection of a blend; the weights of an adapter that is named twice add up.

    Raises:
        HttpError: 400, too many adapters, one without a name, or a weight that is too large.
    """
    weights: dict[str, float] = {}
    for spec, weight in parts:
        weights[spec] = weights.get(spec, 0.0) + weight
        if not spec.partition("@")[0]:
            raise HttpError(400, f"Invalid adapter name {spec[:128]!r}.", param=param)
        if not abs(weights[spec]) <= MAX_WEIGHT:
            message = f"The weight of {spec[:128]!r} is {weights[spec]}; it may be up to {MAX_WEIGHT:,.0f}."
            raise HttpError(400, message, param=param)
    if len(weights) > MAX_BLEND:
        raise HttpError(400, f"A blend of {len(weights)} adapters; the maximum is {MAX_BLEND}.", param=param)
    return AdapterSelection(tuple(sorted(weights.items())))
