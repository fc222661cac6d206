"""`GET /v1/models`: the base, and the adapters that a key may use, with what is known of each. Knows a store."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from anyio.to_thread import run_sync
from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from loradeck.api.errors import HttpError
from loradeck.api.keys import Key
from loradeck.api.model_name import BASE
from loradeck.api.responses import AdapterCard, Model, ModelList, Permission
from loradeck.api.service import reply
from loradeck.api.state import ServerState

if TYPE_CHECKING:
    from loradeck.serve.adapter_cache import Resident
    from loradeck.stored import Stored


@dataclass(frozen=True, slots=True)
class Models:
    """The routes."""

    door: ServerState

    async def all(self, request: Request) -> Response:
        """List the base and the latest version of each adapter that a key may use."""
        return reply(ModelList(await run_sync(self._all, request.state.key)))

    async def one(self, request: Request) -> Response:
        """Describe one of them, by any of its names."""
        return reply(await run_sync(self._one, request.state.key, request.path_params["id"]))

    def _all(self, key: Key) -> list[Model]:
        store = self.door.engine.store
        latest = [stored for stored in store.latest() if key.may_use(stored.name)] if store else []
        residents = self._residents()
        return [self._base(self.door.names.base), *(self._adapter(own.name, own, residents) for own in latest)]

    def _one(self, key: Key, name: str) -> Model:
        store = self.door.engine.store
        try:
            chosen = self.door.names.parse(name)
        except HttpError as error:
            raise _unknown(name) from error
        key.check_use(chosen.names)
        if chosen == BASE:
            return self._base(name)
        if store is None or chosen.label not in (spec for spec, _ in chosen.weights):  # a blend, or scaled
            raise _unknown(name)
        stored = store.find(chosen.label)
        return self._adapter(name, stored, self._residents(), sha256=stored.sha256())

    def _base(self, name: str) -> Model:
        return self._model(name, self.door.started, self.door.names.base, None, UNSET)

    def _adapter(
        self, name: str, stored: "Stored", residents: "Mapping[str, Resident]", *, sha256: str | None = None
    ) -> Model:
        resident = residents.get(stored.spec)
        own = resident if resident is not None and resident.stored == stored else None
        card = AdapterCard(
            rank=stored.facts.r,
            alpha=stored.facts.lora_alpha,
            targets=[*stored.facts.targets],
            bytes=stored.facts.nbytes,
            sha256=sha256 or stored.recorded_sha256 or (own.sha256 if own else None),
            base_sha256=stored.facts.base_fingerprint,
            version=stored.version,
            loaded=own is not None,
            tier=own.tier if own else "disk",
            pinned=own is not None and own.pinned,
            last_used=own.last_used if own else None,
        )
        return self._model(name, int(stored.created), stored.spec, self.door.names.base, card)

    def _model(self, name: str, created: int, root: str, parent: str | None, card: AdapterCard | UnsetType) -> Model:
        permission = [Permission(f"modelperm-{name}", created)]
        return Model(name, created, root, parent, self.door.engine.base.context, permission, card)

    def _residents(self) -> "dict[str, Resident]":
        return {own.spec: own for own in self.door.engine.residency.residents()}


def _unknown(name: str) -> HttpError:
    return HttpError(404, f"{name[:128]!r} is no model. GET /v1/models lists what there is.", param="model")
