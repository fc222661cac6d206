"""The soak of an engine, in this process: many threads ask, one loads, unloads and publishes."""

import gc
import random
import threading
import time
from dataclasses import dataclass
from functools import partial

from benchmarks.soak.asked import Asked, Ledger, Meaning, Questions, Route, Told
from benchmarks.soak.crowd import Crowd
from benchmarks.soak.memory import Memory
from loradeck import Adapter, Base
from loradeck.errors import AdapterError, BusyError, LoradeckError, UnknownAdapterError
from loradeck.sampling import SamplingParams
from loradeck.serve.config import EngineConfig
from loradeck.serve.engine import Engine
from loradeck.serve.kv_cache import KVCache

PATIENCE = 120.0  # seconds after the end for what was begun to end


@dataclass(frozen=True)
class Bounds:
    """How much of everything there is."""

    seconds: float
    clients: int
    longest: int
    """Tokens of a prompt at most."""
    answer: int
    pause: float
    """Seconds between two things done by hand, on average."""
    config: EngineConfig


def soak(base: Base, crowd: Crowd, bounds: Bounds, seed: int) -> tuple[Ledger, dict[str, float]]:
    """Ask, cancel, load, unload and publish at random; return what happened, and what is left."""
    before = living()
    ledger, left, cache = soaked(base, crowd, bounds, seed)
    left["after closing: bytes of the cache"] = cache.nbytes
    left["after closing: adapters in memory"] = living() - before
    return ledger, left


def soaked(base: Base, crowd: Crowd, bounds: Bounds, seed: int) -> tuple[Ledger, dict[str, float], KVCache]:
    """Do so, with the engine's cache."""
    ledger, over, memory = Ledger(), threading.Event(), Memory()
    with Engine(base, crowd.store, bounds.config) as engine:
        threads = [threading.Thread(target=by_hand, args=(engine, crowd, ledger, over, bounds.pause, seed))]
        for number in range(bounds.clients):
            questions = Questions(
                crowd, base.model.config.vocab_size, seed + number + 1, longest=bounds.longest, answer=bounds.answer
            )
            threads.append(threading.Thread(target=client, args=(engine, questions, ledger, over), daemon=True))
        for thread in threads:
            thread.start()
        memory.watch(bounds.seconds, partial(within, engine, ledger))
        over.set()
        until = time.monotonic() + PATIENCE
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))
            if thread.is_alive():
                ledger.fail(TimeoutError(f"{thread.name} has not ended"))
        residency, cache = engine.residency, engine._loop._cache
        residents = residency.residents()
        unknown = {*engine._runner.bank.names()} ^ {own.sha256 for own in residents}
        left = {
            "loads": residency.loads,
            "evictions": residency.evictions,
            "prompt tokens found in the prefix cache": cache.prefixes.hits / max(cache.prefixes.queries, 1),
            **memory.figures(),
            "left: pins": sum(own.pins for own in residents),
            "left: requests": len(engine._loop.live),
            "left: bytes of rows": cache.row_bytes,
            "left: bytes of prefixes, over the budget": cache.nbytes / cache.budget,
            "left: bytes of adapters, over the budget": residency.nbytes / residency.budget,
            "left: adapters that nothing knows": len(unknown),
        }
    return ledger, left, cache


def client(engine: Engine, questions: Questions, ledger: Ledger, over: threading.Event) -> None:
    """Ask one question after the other."""
    while not over.is_set():
        asked = questions.next()
        ledger.count("requests")
        try:
            ask(engine, questions.crowd, asked, ledger)
        except BusyError:
            ledger.count("refused")
            time.sleep(questions.chance.uniform(0, 1))
        except LoradeckError as error:
            ledger.fail(error)
        if questions.chance.random() < 0.1:
            time.sleep(questions.chance.uniform(0, 1))


def ask(engine: Engine, crowd: Crowd, asked: Asked, ledger: Ledger) -> None:
    """Ask, read the answer as far as it is waited for, and keep it."""
    meaning = Meaning.before(crowd, asked.weights)
    stream = engine.submit(asked.prompt, dict(asked.weights) or None, sampling(asked))
    meaning = meaning.after()
    if asked.leaves == 0:
        stream.cancel()
    tokens = []
    for token in stream:
        tokens.append(token)
        if len(tokens) == asked.leaves:
            stream.cancel()
    if meaning.overtaken():
        ledger.count("overtaken")
    key = dict(stream.request.key)
    routes = [route for route in meaning.routes() if contents(crowd, route) == key]
    if not routes:
        return ledger.fail(LookupError(f"{asked.weights} was taken for {key}"))
    if stream.finish not in ("stop", "length", "cancelled") or (stream.finish == "cancelled") > (
        asked.leaves is not None
    ):
        return ledger.fail(RuntimeError(f"{asked} ended as {stream.finish}"))
    logprobs = [token.logprob for token in tokens if token.logprob is not None]
    if len(logprobs) != len(tokens) * asked.scored:
        return ledger.fail(RuntimeError(f"{asked} has {len(logprobs)} log-probabilities"))
    return ledger.keep(Told(asked, routes[:1], [token.id for token in tokens], logprobs, stream.finish))


def contents(crowd: Crowd, route: Route) -> dict[str, float] | None:
    """Return a route by the content of its adapters, as a request's key has it; None if one is not published yet."""
    found: dict[str, float] = {}
    for folder, weight in route:
        try:
            sha256 = crowd.store.find(folder.name).sha256()
        except UnknownAdapterError:
            return None
        found[sha256] = found.get(sha256, 0.0) + weight
    return found


def sampling(asked: Asked) -> SamplingParams:
    return SamplingParams(
        max_tokens=asked.answer,
        temperature=asked.temperature,
        seed=asked.seed,
        ignore_eos=asked.endless,
        logprobs=0 if asked.scored else None,
    )


def by_hand(engine: Engine, crowd: Crowd, ledger: Ledger, over: threading.Event, pause: float, seed: int) -> None:
    """Load, unload and publish."""
    chance = random.Random(seed)
    while not over.wait(chance.uniform(0, 2 * pause)):
        name = crowd.draw(chance)
        kind = chance.choice(("loads by hand", "unloads by hand", "publishes"))
        try:
            if kind == "publishes":
                crowd.publish(name, chance.randrange(2**32, 2**33))
            elif kind == "loads by hand":
                engine.residency.load(name)
            else:
                engine.residency.unload(name)
        except AdapterError as error:
            if "no room" not in str(error):
                ledger.fail(error)
            kind = "loads by hand without room"
        ledger.count(kind)


def within(engine: Engine, ledger: Ledger) -> None:
    """See that nothing takes more than it may."""
    for what, nbytes, budget in (
        ("adapters", engine.residency.nbytes, engine.residency.budget),
        ("rows", engine.stats.kv_bytes, engine.stats.kv_budget),
    ):
        if nbytes > budget:
            ledger.fail(MemoryError(f"{what} take {nbytes} of {budget} bytes"))


def living() -> int:
    """Return how many adapters there are in this process."""
    gc.collect()
    return sum(type(own) is Adapter for own in gc.get_objects())
