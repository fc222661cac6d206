"""`GET /v1/adapters/compare`: what two adapters change, module by module."""

import math

from anyio.to_thread import run_sync
from starlette.requests import Request
from starlette.responses import Response

from loradeck.api.adapters import one_adapter
from loradeck.api.requests import ComparisonQuery, read_query
from loradeck.api.responses import AdapterComparison, ModuleComparison, json_response
from loradeck.api.state import ServerState, state_of
from loradeck.base import openmp


async def compare_adapters(request: Request) -> Response:
    """Compare what two adapters change at each module."""
    state, key = state_of(request), request.state.key
    query = read_query(request, ComparisonQuery)
    a = await run_sync(one_adapter, state, key, query.a, "a")
    b = await run_sync(one_adapter, state, key, query.b, "b")
    async with state.comparing:
        return json_response(await run_sync(_compare, state, a, b))


def _compare(state: ServerState, a: str, b: str) -> AdapterComparison:
    from loradeck.lora.distance import compare, overall

    openmp.alone()  # a second team of threads would slow down the engine's
    cache = state.engine.adapter_cache
    first, second = cache.find(a), cache.find(b)
    modules = compare(*(cache.bank.check(stored.path) for stored in (first, second)))
    return AdapterComparison(
        first.spec,
        second.spec,
        _finite(overall(modules)),
        [
            ModuleComparison(module.path, *module.norms, _finite(module.distance), module.similarity)
            for module in modules
        ],
    )


def _finite(distance: float) -> float | None:
    return distance if math.isfinite(distance) else None
