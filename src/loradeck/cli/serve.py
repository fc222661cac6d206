"""`loradeck serve`: one base and a store of adapters behind OpenAI's API. Puts the parts together; computes nothing."""

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from loradeck.api.settings import Settings
from loradeck.cli import allocator
from loradeck.cli.display.text import shown
from loradeck.cli.imports import heavy
from loradeck.cli.options import Dtype, Weights
from loradeck.errors import LoradeckError
from loradeck.serve.config import EngineConfig

if TYPE_CHECKING:
    from loradeck.serve.engine import Engine

ENGINE, SETTINGS = EngineConfig(), Settings()
TRIED = 8  # adapters that are tried until one can be used in the example


def serve(
    base: str,
    /,
    *,
    adapters: Path | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    keys: Path | None = None,
    dtype: Dtype = "auto",
    weights: Weights = "packed",
    engine: Annotated[EngineConfig, Parameter(name="*")] = ENGINE,
    settings: Annotated[Settings, Parameter(name="*")] = SETTINGS,
) -> None:
    """Serve a base and a folder of adapters over HTTP, as OpenAI's clients ask.

    Clients choose an adapter by `model`: its name, name@version, or a blend as
    in poet*0.7+pirate*0.3. Any adapter of the folder, and any that is put there
    later, is loaded when it is first asked for. Ctrl-C and SIGTERM let running
    requests end. docs/serving.md tells more.

    Args:
        base: A folder, a hub id, a .gguf file, or smollm2-135m.
        adapters: A folder of adapters' folders.
        host: The address to listen on; other than this machine's own only with --keys.
        port: 0 takes a free one.
        keys: A file of API keys, and what each may do.
    """
    begun = time.perf_counter()
    from loradeck.api.keys import Keys
    from loradeck.api.server import Server, listen, url_of
    from loradeck.store import AdapterStore

    known = Keys.load(keys) if keys else Keys()
    store = AdapterStore(adapters) if adapters else None
    count = len(store.names()) if store else 0  # what is wrong with the folder, before the base takes its seconds
    with listen(host, port, guarded=bool(known)) as address:
        allocator.thrifty()
        with heavy():
            from loradeck.api.app import app
            from loradeck.api.metrics import Metrics
            from loradeck.base.load import Base
            from loradeck.serve.engine import Engine

        loaded = Base.load(base, dtype=dtype, weights=weights)
        metrics = Metrics(loaded.name, settings.top_adapters)
        with Engine(loaded, store, engine, observer=metrics) as running:
            own = replace(settings, hosts=(*settings.hosts, f"[{host}]" if ":" in host else host))
            server = Server(app(running, metrics, keys=known, settings=own), address)
            url = url_of(address)
            example = curl(url, running, guarded=bool(known))
            took = time.perf_counter() - begun
            print(
                shown(f"{loaded.name} with {count} adapters on {url}, after {took:.1f} s; try:\n{example}"), flush=True
            )
            server.serve_here()


def curl(url: str, engine: "Engine", *, guarded: bool) -> str:
    """Return a command that asks a server for something, of an adapter if there is one that can be used."""
    import shlex

    import msgspec

    asked: dict[str, object] = {"model": usable(engine) or engine.base.name, "max_tokens": 32, "temperature": 0}
    if engine.base.tokenizer.chat_template is None:
        path, asked["prompt"] = "completions", "Once upon a time"
    else:
        path, asked["messages"] = "chat/completions", [{"role": "user", "content": "Hello!"}]
    body = msgspec.json.encode(asked).decode()
    key = ' -H "authorization: Bearer $KEY"' if guarded else ""
    return f"curl {url}/v1/{path} -H 'content-type: application/json'{key} -d {shlex.quote(body)}"


def usable(engine: "Engine") -> str | None:
    """Load one of the adapters, and return its name; None where none of those that were tried fits the base."""
    for stored in engine.store.latest()[:TRIED] if engine.store else ():
        try:
            engine.residency.load(stored.spec)
        except LoradeckError:
            continue
        return stored.name
    return None
