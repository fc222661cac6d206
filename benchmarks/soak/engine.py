"""The soak of an engine, in this process: many threads send requests, one loads, unloads and publishes."""

import gc
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.memory import MemoryTrace
from benchmarks.soak.catalogue import Catalogue
from benchmarks.soak.requests import Answer, Ledger, RandomRequests, Request, Resolution, Route
from loradeck import Adapter, Base
from loradeck.errors import AdapterError, BusyError, LoradeckError, UnknownAdapterError
from loradeck.runner.interface import Cache
from loradeck.serve.config import EngineConfig
from loradeck.serve.engine import Engine

PATIENCE = 600.0  # seconds after the end for requests to finish


@dataclass(frozen=True)
class Limits:
    """How long the soak takes, how many clients there are, and how much room."""

    seconds: float
    """At most; `enough` ends it before."""
    clients: int
    max_prompt: int
    """Tokens; so is `max_tokens`."""
    max_tokens: int
    pause: float
    """Seconds between two administrative actions, on average."""
    config: EngineConfig
    enough: Callable[[Ledger], bool] = lambda _: False


def soak(base: Base, catalogue: Catalogue, limits: Limits, seed: int) -> tuple[Ledger, dict[str, float]]:
    """Request, cancel, load, unload and publish at random; return what happened, and what is left."""
    before = live_adapters()
    ledger, figures, cache = run(base, catalogue, limits, seed)
    figures["after closing: bytes of the cache"] = cache.nbytes
    figures["after closing: adapters in memory"] = live_adapters() - before
    return ledger, figures


def run(base: Base, catalogue: Catalogue, limits: Limits, seed: int) -> tuple[Ledger, dict[str, float], Cache]:
    """Do so until the engine is closed, and return its cache too."""
    ledger, stop, memory = Ledger(), threading.Event(), MemoryTrace()
    with Engine(base, catalogue.store, limits.config) as engine:
        threads = [threading.Thread(target=administer, args=(engine, catalogue, ledger, stop, limits.pause, seed))]
        for number in range(limits.clients):
            requests = RandomRequests(
                catalogue,
                base.model.config.vocab_size,
                seed + number + 1,
                max_prompt=limits.max_prompt,
                max_tokens=limits.max_tokens,
            )
            threads.append(threading.Thread(target=client, args=(engine, requests, ledger, stop), daemon=True))
        for thread in threads:
            thread.start()

        def check() -> bool:
            check_budgets(engine, ledger)
            ledger.counts["evictions"] = engine.adapter_cache.evictions
            return limits.enough(ledger)

        memory.watch(limits.seconds, check)
        stop.set()
        deadline = time.monotonic() + PATIENCE
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                ledger.fail(TimeoutError(f"{thread.name} has not ended"))
        adapter_cache, cache = engine.adapter_cache, engine.stats.cache
        residents = adapter_cache.residents()
        unknown = {*engine._runner.bank.names()} ^ {resident.sha256 for resident in residents}
        figures = {
            "loads": adapter_cache.loads,
            "evictions": adapter_cache.evictions,
            "prompt tokens found in the prefix cache": cache.prefixes.hits / max(cache.prefixes.queries, 1),
            **memory.figures(),
            "left: pins": sum(resident.pins for resident in residents),
            "left: requests": len(engine._loop.live),
            "left: bytes of rows": cache.row_bytes,
            "left: bytes of prefixes, over the budget": cache.nbytes / cache.budget,
            "left: bytes of adapters, over the budget": adapter_cache.nbytes / adapter_cache.budget,
            "left: adapters that nothing knows": len(unknown),
        }
    return ledger, figures, cache


def client(engine: Engine, requests: RandomRequests, ledger: Ledger, stop: threading.Event) -> None:
    """Send one request after the other."""
    while not stop.is_set():
        request = requests.next()
        ledger.count("requests")
        try:
            send(engine, requests.catalogue, request, ledger)
        except BusyError:
            ledger.count("refused")
            time.sleep(requests.rng.uniform(0, 1))
        except LoradeckError as error:
            ledger.fail(error)
        if requests.rng.random() < 0.1:
            time.sleep(requests.rng.uniform(0, 1))


def send(engine: Engine, catalogue: Catalogue, request: Request, ledger: Ledger) -> None:
    """Send a request, read its answer until it ends or is cancelled, and add it to the ledger."""
    resolution = Resolution.before(catalogue, request.weights)
    stream = engine.submit(request.prompt, dict(request.weights) or None, request.sampling)
    resolution = resolution.after()
    if request.cancel_after == 0:
        stream.cancel()
    tokens = []
    for token in stream:
        tokens.append(token)
        if len(tokens) == request.cancel_after:
            stream.cancel()
    if resolution.is_outdated():
        ledger.count("overtaken")
    if stream.request.cached:
        ledger.count("prefixes found")
    key = dict(stream.request.key)
    routes = [route for route in resolution.routes() if content_key(catalogue, route) == key]
    if not routes:
        return ledger.fail(LookupError(f"{request.weights} resolved to {key}"))
    cancelled = stream.finish == "cancelled"
    if stream.finish not in ("stop", "length", "cancelled") or (cancelled and request.cancel_after is None):
        return ledger.fail(RuntimeError(f"{request} ended as {stream.finish}"))
    logprobs = [token.logprob for token in tokens if token.logprob is not None]
    if len(logprobs) != len(tokens) * request.logprobs:
        return ledger.fail(RuntimeError(f"{request} has {len(logprobs)} log-probabilities"))
    return ledger.add(Answer(request, routes[:1], [token.id for token in tokens], logprobs, stream.finish))


def content_key(catalogue: Catalogue, route: Route) -> dict[str, float] | None:
    """Return a route by its adapters' content hashes, as a request's key has it; None if one is not published yet."""
    key: dict[str, float] = {}
    for folder, weight in route:
        try:
            sha256 = catalogue.store.find(folder.name).sha256()
        except UnknownAdapterError:
            return None
        key[sha256] = key.get(sha256, 0.0) + weight
    return key


def administer(
    engine: Engine, catalogue: Catalogue, ledger: Ledger, stop: threading.Event, pause: float, seed: int
) -> None:
    """Load, unload and publish."""
    rng = random.Random(seed)
    while not stop.wait(rng.uniform(0, 2 * pause)):
        name = catalogue.draw(rng)
        kind = rng.choice(("loads by hand", "unloads by hand", "publishes"))
        try:
            if kind == "publishes":
                catalogue.publish(name, rng.randrange(2**32, 2**33))
            elif kind == "loads by hand":
                engine.adapter_cache.load(name)
            else:
                engine.adapter_cache.unload(name)
        except AdapterError as error:
            if "no room" not in str(error):
                ledger.fail(error)
            kind = "loads by hand without room"
        ledger.count(kind)


def check_budgets(engine: Engine, ledger: Ledger) -> None:
    for name, nbytes, budget in (
        ("adapters", engine.adapter_cache.nbytes, engine.adapter_cache.budget),
        ("rows", engine.stats.kv_bytes, engine.stats.kv_budget),
    ):
        if nbytes > budget:
            ledger.fail(MemoryError(f"{name} take {nbytes} of {budget} bytes"))


def live_adapters() -> int:
    """Return how many adapters this process holds."""
    gc.collect()
    return sum(type(each) is Adapter for each in gc.get_objects())
