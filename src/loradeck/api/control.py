"""Loading, unloading, scaling by hand: vLLM's two routes, and llama.cpp's list. Knows a store, and what is resident."""

from dataclasses import dataclass
from pathlib import Path

from anyio.to_thread import run_sync
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from loradeck.api import parse
from loradeck.api.errors import HttpError
from loradeck.api.keys import Key
from loradeck.api.requests import LOAD_REFUSES, LoadRequest, Scale, UnloadRequest
from loradeck.api.responses import AdapterScale, Success
from loradeck.api.service import reply
from loradeck.api.state import ServerState
from loradeck.errors import UnknownAdapterError
from loradeck.store import AdapterStore

INVALID = "InvalidUserInput"  # vLLM's word


@dataclass(frozen=True, slots=True)
class Control:
    """The routes; what changes anything needs a key with control."""

    door: ServerState

    async def load(self, request: Request) -> Response:
        """Make an adapter resident; one from outside the store is published there first."""
        request.state.key.check_control()
        asked = await parse.read(request, LoadRequest, self.door.settings.max_body_bytes, LOAD_REFUSES)
        await run_sync(self._load, asked)
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' added successfully.")

    async def unload(self, request: Request) -> Response:
        """Give an adapter's memory back once nobody uses it; it stays in the store, and comes back when asked for."""
        request.state.key.check_control()
        asked = await parse.read(request, UnloadRequest, self.door.settings.max_body_bytes)
        await run_sync(self._unload, asked.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.")

    async def scales(self, request: Request) -> Response:
        """List the adapters that a key may use, with their numbers and scales."""
        return reply(await run_sync(self._scales, request.state.key))

    async def rescale(self, request: Request) -> Response:
        """Set the scales of the requests that name no model."""
        request.state.key.check_control()
        asked = await parse.read(request, list[Scale], self.door.settings.max_body_bytes)
        await run_sync(self._rescale, asked)
        return reply(Success(True))

    def _load(self, asked: LoadRequest) -> None:
        store, name = self._store, asked.lora_name
        path = asked.lora_path or name
        if path in (name, str(store.folder / name)):
            if not asked.load_inplace and self._resident(name):
                raise HttpError(400, f"The adapter {name!r} is already loaded.", param="lora_name", kind=INVALID)
        else:
            source = self._source(store, path)
            if not asked.load_inplace and name in store.names():
                hint = "load_inplace=true makes this its next version."
                raise HttpError(400, f"The name {name!r} is taken.", param="lora_name", kind=INVALID, hint=hint)
            store.publish(name, source)
        self.door.engine.residency.load(name)

    @staticmethod
    def _source(store: AdapterStore, path: str) -> Path:
        """Return the folder that `path` means: an adapter of the store, or else any on this machine."""
        try:
            return store.find(path).path
        except UnknownAdapterError:
            source = Path(path)
        if source.is_absolute() and source.is_dir():
            return source
        raise HttpError(404, f"There is no adapter at {path[:200]!r}.", param="lora_path")

    def _unload(self, name: str) -> None:
        if not self._resident(name):
            raise HttpError(404, f"The adapter {name[:128]!r} is not loaded.", param="lora_name")
        self.door.engine.residency.unload(name)

    def _resident(self, spec: str) -> bool:
        return self.door.engine.residency.tier(self._store.find(spec).sha256()) == "device"

    def _scales(self, key: Key) -> list[AdapterScale]:
        numbering = self.door.numbering
        return [
            AdapterScale(number, name, numbering.scales.get(name, 0.0))
            for number, name in numbering.names().items()
            if key.may_use(name)
        ]

    def _rescale(self, asked: list[Scale]) -> None:
        numbering = self.door.numbering
        numbering.rescale({numbering.name(scale.id): scale.scale for scale in asked})

    @property
    def _store(self) -> AdapterStore:
        if self.door.engine.store is None:
            raise HttpError(404, "This server has no store of adapters.")
        return self.door.engine.store
