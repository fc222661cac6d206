"""Changes of the store besides loading: an adapter is removed, or made of others."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from anyio.to_thread import run_sync
from starlette.requests import Request
from starlette.responses import Response

from loradeck.api.adapter_publishing import check_new_name, publish_folder, store_of, work_folder
from loradeck.api.adapters import adapter_card, one_adapter, residents_of
from loradeck.api.errors import HttpError
from loradeck.api.requests import CombineRequest, read_body
from loradeck.api.responses import ModelCard, ModelDeleted, json_response
from loradeck.api.state import ServerState, state_of
from loradeck.base import openmp
from loradeck.blend import format_blend
from loradeck.tokenizer_files import TokenizerFiles

if TYPE_CHECKING:
    from loradeck.lora.adapter import Adapter
    from loradeck.stored import Stored


# ---- removing


async def delete_model(request: Request) -> Response:
    """Remove an adapter, or one version of it, from the disk and from memory; requests that use it finish."""
    state, key, id = state_of(request), request.state.key, request.path_params["id"]
    key.check_control()
    spec = await run_sync(one_adapter, state, key, id)
    name = spec.partition("@")[0]
    key.check_create(name, "model")
    async with state.lock(name):
        await run_sync(_remove, state, spec)
    return json_response(ModelDeleted(id))


def _remove(state: ServerState, spec: str) -> None:
    store, cache = store_of(state), state.engine.adapter_cache
    name, _, version = spec.partition("@")
    removed = store.remove(spec)
    for resident in cache.residents():
        if resident.stored.name == name and (not version or resident.stored.version in removed):
            cache.discard(resident.sha256)
    if name not in store.names():
        state.adapter_ids.forget(name)


# ---- combining


async def combine_adapters(request: Request) -> Response:
    """Publish a blend of adapters as an adapter of its own."""
    state, key = state_of(request), request.state.key
    key.check_control()
    body = await read_body(request, CombineRequest, state.config.max_body_bytes)
    check_new_name(state, key, body.name)
    weights: dict[str, float] = {}
    for name, weight in body.weights.items():
        spec = await run_sync(one_adapter, state, key, name, "weights")
        weights[spec] = weights.get(spec, 0.0) + weight
    if not any(weights.values()):
        raise HttpError(400, "All weights are 0.", param="weights")
    async with state.comparing, state.lock(body.name):
        return json_response(await run_sync(_combine, state, body, weights))


def _combine(state: ServerState, body: CombineRequest, weights: Mapping[str, float]) -> ModelCard:
    from loradeck.lora.combine import combine, lower_rank

    openmp.alone()  # a second team of threads would slow down the engine's
    key, stored = state.engine.adapter_cache.resolve(dict(weights))
    if not key:  # the weights of one adapter by two names add up to 0
        raise HttpError(400, "All weights are 0.", param="weights")
    weighted = [(_read(state, stored[sha256]), weight) for sha256, weight in key]
    weighted.sort(key=lambda pair: -max(tensor.dtype.itemsize for _, tensor in pair[0].tensors()))  # the first's dtype
    adapter = combine(weighted).adapter
    record = {"blend": format_blend((stored[sha256].spec, weight) for sha256, weight in key)}
    if body.max_rank is not None and any(site.r > body.max_rank for site in adapter.sites.values()):
        lowered = lower_rank(adapter, body.max_rank)
        adapter, record["rank_error"] = lowered.adapter, f"{lowered.error:.4g}"
    adapter.describe(base_fingerprint=state.engine.base.fingerprint, **record)
    adapter.tokenizer_files = _shared_tokenizer(stored.values())
    with work_folder(store_of(state)) as folder:
        version = publish_folder(state, body.name, adapter.save(folder / "adapter"), f"the blend {record['blend']}")
    return adapter_card(state, version.spec, version, residents_of(state))


def _read(state: ServerState, stored: "Stored") -> "Adapter":
    """Read an adapter that fits the base; copies of the base's weights are left out."""
    from loradeck.lora.adapter import Adapter
    from loradeck.lora.compatibility import why_not_a_copy

    bank = state.engine.adapter_cache.bank
    return Adapter.from_files(bank.check(stored.path), check_copy=partial(why_not_a_copy, bank.model))


def _shared_tokenizer(adapters: "Iterable[Stored]") -> TokenizerFiles:
    """Return the tokenizer's files that all adapters have alike, with which their blend is served; else none."""
    first, *others = (stored.tokenizer_files for stored in adapters)
    if first.names and all(other.names == first.names and other.read() == first.read() for other in others):
        return first
    return TokenizerFiles()
