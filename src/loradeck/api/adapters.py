"""Models and adapters: OpenAI's list, vLLM's routes to load and unload, llama.cpp's scales."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from anyio.to_thread import run_sync
from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from loradeck.api.adapter_publishing import is_latest, publish, store_of
from loradeck.api.auth import ApiKey
from loradeck.api.errors import HttpError
from loradeck.api.model_name import BASE
from loradeck.api.requests import LoadAdapterRequest, LoraScale, UnloadAdapterRequest, read_body
from loradeck.api.responses import (
    AdapterDetails,
    LoraAdapter,
    ModelCard,
    ModelList,
    ModelPermission,
    SuccessResponse,
    json_response,
)
from loradeck.api.state import ServerState, state_of
from loradeck.errors import AdapterError, ConfigError, UnknownAdapterError
from loradeck.lora.names import check_name
from loradeck.stored import Stored, read_stored

if TYPE_CHECKING:
    from loradeck.serve.adapter_cache import Resident

INVALID_USER_INPUT = "InvalidUserInput"  # vLLM's error type


# ---- models


async def list_models(request: Request) -> Response:
    """List the base, and the latest version of each adapter that fits it and that the key may use."""
    return json_response(ModelList(await run_sync(_list_models, state_of(request), request.state.key)))


async def get_model(request: Request) -> Response:
    """Describe a model, by any of its names."""
    if not request.path_params["id"]:  # the list's path with a slash at its end
        return await list_models(request)
    return json_response(await run_sync(_get_model, state_of(request), request.state.key, request.path_params["id"]))


async def list_versions(request: Request) -> Response:
    """List the versions of an adapter that fit the base, the newest first."""
    state, name = state_of(request), request.path_params["name"]
    return json_response(ModelList(await run_sync(_list_versions, state, request.state.key, name)))


def _list_models(state: ServerState, key: ApiKey) -> list[ModelCard]:
    residents = residents_of(state)
    latest = [stored for stored in state.catalogue.usable() if key.may_use(stored.name)]
    return [
        _base_card(state, state.names.base),
        *(adapter_card(state, stored.name, stored, residents) for stored in latest),
    ]


def _get_model(state: ServerState, key: ApiKey, name: str) -> ModelCard:
    try:
        selection = state.names.parse(name)
    except HttpError as error:
        raise unknown_model(name) from error
    state.check_adapters(key, selection.names)
    if selection == BASE:
        return _base_card(state, name)
    if selection.label not in dict(selection.weights):  # a blend, or a scaled adapter
        raise unknown_model(name)
    stored = state.engine.adapter_cache.find(selection.label)
    state.engine.adapter_cache.check(stored)
    return adapter_card(state, name, stored, residents_of(state), sha256=stored.sha256())


def _list_versions(state: ServerState, key: ApiKey, name: str) -> list[ModelCard]:
    state.check_adapters(key, [name])
    store, residents = store_of(state), residents_of(state)
    cards = []
    for stored in reversed(store.listed(name).values()):
        if isinstance(stored, Stored):
            with suppress(AdapterError, ConfigError):  # as in the list of models
                state.engine.adapter_cache.check(stored)
                cards.append(adapter_card(state, stored.spec, stored, residents))
    return cards


def one_adapter(state: ServerState, key: ApiKey, name: str, param: str = "model") -> str:
    """Return the adapter that a name stands for, as `name` or `name@version`, whether or not it exists.

    Raises:
        HttpError: 400, it is the base; 403, the key may not use it; 404, it is a blend.
    """
    try:
        selection = state.names.parse(name, param)
    except HttpError as error:
        raise unknown_model(name, param) from error
    state.check_adapters(key, selection.names)
    if selection == BASE:
        raise HttpError(400, f"{name[:128]!r} is the base, not an adapter.", param=param)
    if selection.label not in dict(selection.weights):  # a blend, or a scaled adapter
        raise unknown_model(name, param)
    return selection.label


def _base_card(state: ServerState, name: str) -> ModelCard:
    return _model_card(state, name, state.started, state.names.base, None, UNSET)


def adapter_card(
    state: ServerState,
    name: str,
    stored: Stored,
    residents: "Mapping[str, Resident]",
    *,
    sha256: str | None = None,
) -> ModelCard:
    """Describe an adapter under a name; `residents` are those of `residents_of`."""
    resident = residents.get(stored.spec)
    if resident and resident.stored != stored and resident.sha256 != stored.recorded_sha256:  # loaded from other files
        resident = None
    details = AdapterDetails(
        rank=stored.facts.r,
        alpha=stored.facts.lora_alpha,
        targets=[*stored.facts.targets],
        bytes=stored.facts.nbytes,
        sha256=sha256 or stored.recorded_sha256 or (resident.sha256 if resident else None),
        base_sha256=stored.facts.base_fingerprint,
        version=stored.version,
        loaded=resident is not None,
        tier=resident.tier if resident else "disk",
        pinned=resident is not None and resident.pinned,
        last_used=resident.last_used if resident else None,
    )
    return _model_card(state, name, int(stored.created), stored.spec, state.names.base, details)


def _model_card(
    state: ServerState, name: str, created: int, root: str, parent: str | None, adapter: AdapterDetails | UnsetType
) -> ModelCard:
    permission = [ModelPermission(f"modelperm-{name}", created)]
    return ModelCard(name, created, root, parent, state.engine.base.context, permission, adapter)


def residents_of(state: ServerState) -> "dict[str, Resident]":
    """Return the adapters in memory, by name and version."""
    return {resident.spec: resident for resident in state.engine.adapter_cache.residents()}


def unknown_model(name: str, param: str = "model") -> HttpError:
    """Return the error of a name that no model has."""
    return HttpError(404, f"Unknown model {name[:128]!r}.", param=param, hint="GET /v1/models lists the models.")


# ---- loading


async def load_adapter(request: Request) -> Response:
    """Load an adapter; a folder from outside the store is published there once it is loaded."""
    request.state.key.check_control()
    state = state_of(request)
    body = await read_body(request, LoadAdapterRequest, state.config.max_body_bytes)
    async with state.lock(body.lora_name):
        await run_sync(_load_adapter, state, body)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


async def unload_adapter(request: Request) -> Response:
    """Free an adapter's memory once no request uses it; it stays in the store and is loaded again on demand."""
    request.state.key.check_control()
    state = state_of(request)
    body = await read_body(request, UnloadAdapterRequest, state.config.max_body_bytes)
    if not await run_sync(state.engine.adapter_cache.unload, body.lora_name):
        raise HttpError(404, f"The adapter {body.lora_name[:128]!r} is not loaded.", param="lora_name")
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _load_adapter(state: ServerState, body: LoadAdapterRequest) -> None:
    """Load an adapter. If this fails, the store and the adapters in memory are as before."""
    store, cache, name = store_of(state), state.engine.adapter_cache, body.lora_name
    source = _source(state, name, body.lora_path or name)
    same, exists = is_latest(store, name, source), name in store.names()
    if state.names.parse(name) == BASE:
        raise _taken(f"The name {name!r} is the base's.")
    if not body.load_inplace and same and _is_loaded(state, name, source.sha256()):
        raise _taken(f"The adapter {name!r} is already loaded.")
    if not body.load_inplace and exists and not same:
        raise _taken(f"The name {name!r} is taken.", hint="load_inplace=true publishes the next version of it.")
    state.engine.tokenizer_of(source)  # raises if it has one that cannot be used
    if same:
        cache.load(source)
    else:
        check_name(name)
        publish(state, name, source, str(source.path))


def _source(state: ServerState, name: str, path: str) -> Stored:
    """Return the adapter of a `lora_path`: one of the store or of the hub, or that of an absolute path here."""
    source = Path(path)
    with suppress(UnknownAdapterError):
        return state.engine.adapter_cache.find(source.name if source.parent == store_of(state).folder else path)
    try:
        if source.is_absolute() and source.is_dir():
            return read_stored(name, 0, source, None)
    except OSError as error:  # such as a path that is too long
        raise AdapterError(f"{path[:200]!r} cannot be read: {error.strerror}") from error
    raise HttpError(
        404,
        f"There is no adapter at {path[:200]!r}.",
        param="lora_path",
        hint="Give the name of an adapter in the store, or an absolute path.",
    )


def _is_loaded(state: ServerState, name: str, sha256: str) -> bool:
    """Return whether an adapter is on the device by this name; an adapter of the same content may have another."""
    residents = [each for each in state.engine.adapter_cache.residents() if each.sha256 == sha256]
    return any(each.tier == "device" and each.stored.name == name for each in residents)


def _taken(message: str, *, hint: str = "") -> HttpError:
    return HttpError(400, message, param="lora_name", error_type=INVALID_USER_INPUT, hint=hint)


# ---- llama.cpp's scales


async def list_lora_adapters(request: Request) -> Response:
    """List the adapters that the key may use, with their ids and scales."""
    return json_response(await run_sync(_list_lora_adapters, state_of(request), request.state.key))


async def set_lora_scales(request: Request) -> Response:
    """Set the scales of requests that name no model."""
    request.state.key.check_control()
    state = state_of(request)
    body = await read_body(request, list[LoraScale], state.config.max_body_bytes)
    await run_sync(_set_lora_scales, state, body)
    return json_response(SuccessResponse(True))


def _list_lora_adapters(state: ServerState, key: ApiKey) -> list[LoraAdapter]:
    scales = state.adapter_ids.scales
    usable = {stored.name for stored in state.catalogue.usable() if key.may_use(stored.name)}
    return [
        LoraAdapter(number, name, scales.get(name, 0.0))
        for number, name in state.adapter_ids.names().items()
        if name in usable
    ]


def _set_lora_scales(state: ServerState, scales: list[LoraScale]) -> None:
    ids = state.adapter_ids
    ids.set_scales({ids.name(scale.id): scale.scale for scale in scales})
