"""`loradeck serve`: one base and a store of adapters behind OpenAI's API."""

import logging
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, fields, replace
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from loradeck.api.config import ServerConfig
from loradeck.api.service import ServiceConfig, serving
from loradeck.base.onednn import cap_kernel_cache
from loradeck.cli.adapter_folder import read_adapter
from loradeck.cli.display.text import printable
from loradeck.cli.options import Dtype, ServedTask, Weights, is_typed
from loradeck.cli.process import cap_allocator, quick_imports
from loradeck.errors import ConfigError, LoradeckError
from loradeck.live.config import LiveConfig
from loradeck.scale.config import ScaleConfig
from loradeck.serve.config import EngineConfig

if TYPE_CHECKING:
    from loradeck.serve.engine import Engine
    from loradeck.serve.pooling_engine import PoolingEngine

ENGINE, SERVER, LIVE, SCALE = EngineConfig(), ServerConfig(), LiveConfig(), ScaleConfig()
ATTEMPTS = 8  # adapters to try for the example

log = logging.getLogger(__name__)


def serve(
    base: str,
    /,
    *,
    adapters: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    keys: Path | None = None,
    dtype: Dtype = "auto",
    weights: Weights = "blocks",
    task: ServedTask = "generate",
    draft_model: str | None = None,
    train: bool = False,
    engine: Annotated[EngineConfig, Parameter(name="*")] = ENGINE,
    config: Annotated[ServerConfig, Parameter(name="*")] = SERVER,
    live: Annotated[LiveConfig, Parameter(name="*")] = LIVE,
    ray: bool = False,
    scale: Annotated[ScaleConfig, Parameter(name="*")] = SCALE,
    on_ready: Annotated[Callable[[str], object] | None, Parameter(parse=False)] = None,
) -> None:
    """Serve a base and its adapters as an OpenAI-compatible API.

    A request's `model` selects the adapter: its name, name@version, or a blend
    such as poet*0.7+pirate*0.3. An adapter is loaded on its first request, also
    if it was added to the folder later. Ctrl-C and SIGTERM let running requests
    finish. The log, one line per request, goes to stderr. A browser shows the
    server's page at its address. See docs/serving.md and docs/page.md.

    Args:
        base: A folder, a hub id, a .gguf file, or smollm2-135m.
        adapters: A folder of adapters' folders, or the URL of a store: s3://bucket/adapters.
        host: The address to listen on; any but the loopback needs a file of API keys.
        port: The port to listen on; 0 picks a free one.
        keys: A file of API keys with the permissions of each.
        draft_model: A smaller base with the same tokenizer, which drafts tokens that the base then checks.
        train: Train adapters too, as OpenAI's fine-tuning jobs, and publish them in the folder of adapters. Files and
            jobs are in .live there. See docs/live.md.
        ray: Serve by replicas on a Ray cluster, each with an engine of its own. See docs/scale.md.
        on_ready: Called with the server's URL once it answers.
    """
    start = time.perf_counter()
    from loradeck.api.server import Server, listen, url_of
    from loradeck.lora.manifest import is_adapter

    _check_training(adapters, train)
    _check_typed(ScaleConfig, "ray", "of replicas", is_on=ray)
    service_config = ServiceConfig(
        base=base,
        adapters=adapters,
        keys=None if keys is None else str(keys),
        dtype=dtype,
        weights=weights,
        task=task,
        draft_model=draft_model,
        train=train,
        engine=engine,
        server=replace(config, hosts=(*config.hosts, f"[{host}]" if ":" in host else host)),
        live=live,
    )
    api_keys, store = service_config.api_keys(), service_config.store()
    count = len(store.names()) if store else 0
    if store and not count and is_adapter(store.folder):
        read_adapter(str(adapters))  # another program's is no better in a folder
        raise ConfigError(f"{adapters} is an adapter, not a folder of adapters", hint="Give the folder that holds it.")
    if ray:
        with listen(host, port, has_keys=bool(api_keys)) as address:  # may it be used?
            port = address.getsockname()[1]
        _serve_replicas(service_config, scale, host, port, on_ready)
        return
    with listen(host, port, has_keys=bool(api_keys)) as address, ExitStack() as stack:
        cap_allocator()
        cap_kernel_cache()
        with quick_imports():
            import loradeck.api.app
            import loradeck.serve.engine  # noqa: F401
        service = stack.enter_context(serving(service_config, api_keys, store))
        url = url_of(address)
        example = curl(url, service.engine, has_keys=bool(api_keys))
        settings = {"weights": weights, "keys": len(api_keys), **asdict(engine), **asdict(config)}
        settings |= {"train": train, **asdict(live)}

        def announce() -> None:
            adapter_count = f"{count} adapter{'s' * (count != 1)}"
            seconds = time.perf_counter() - start
            ready = f"{service.engine.base.name} with {adapter_count} on {url}, after {seconds:.1f} s; try:\n{example}"
            print(printable(f"{ready}\nor open {url} in a browser"), flush=True)
            _log_start(service.engine, url, count, settings)
            if on_ready:
                on_ready(url)

        Server(service.application, address, announce).serve_forever()


def _serve_replicas(
    service: ServiceConfig, scale: ScaleConfig, host: str, port: int, on_ready: Callable[[str], object] | None
) -> None:
    from loradeck.scale.app import served
    from loradeck.scale.cluster import cluster

    stop = Event()
    with cluster(scale.ray_address):
        for number in (signal.SIGINT, signal.SIGTERM):  # only now, for Ray has handlers of its own, which abort
            signal.signal(number, lambda *_: stop.set())
        with served(service, scale, host=host, port=port):
            url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
            print(printable(f"{service.base} by {scale.replicas} replicas on {url}"), flush=True)
            if on_ready:
                on_ready(url)
            stop.wait()


def _check_training(adapters: str | None, train: bool) -> None:
    from loradeck.store import is_url

    if train and adapters is None:
        raise ConfigError("--train needs a folder to publish adapters in", hint="Add --adapters FOLDER.")
    if train and adapters is not None and is_url(adapters):
        raise ConfigError(
            f"--train keeps its jobs in the folder of adapters, and {adapters} is elsewhere",
            hint="Train in a folder, and `loradeck push` what is to be served elsewhere.",
        )
    _check_typed(LiveConfig, "train", "of training", is_on=train)


def _check_typed(config: type[LiveConfig] | type[ScaleConfig], flag: str, what: str, *, is_on: bool) -> None:
    typed = [field.name for field in fields(config) if is_typed(field.name)]
    if typed and not is_on:
        raise ConfigError(f"--{typed[0].replace('_', '-')} is a setting {what}", hint=f"Add --{flag}.")


def _log_start(engine: "Engine | PoolingEngine", url: str, adapters: int, settings: Mapping[str, object]) -> None:
    base, store = engine.base, engine.store
    log.info(
        "serving %(base)s in %(dtype)s on %(url)s with %(adapters)d adapters: at most %(max_rows)d rows, "
        "%(adapter_bytes)d bytes of adapters, %(kv_cache_bytes)d of the KV cache, %(max_waiting)d waiting",
        {
            "base": base.name,
            "source": base.source,
            "task": base.task,
            "dtype": str(base.model.dtype).removeprefix("torch."),
            "url": url,
            "store": store.location if store else None,
            "adapters": adapters,
            **settings,
        },
    )


def curl(url: str, engine: "Engine | PoolingEngine", *, has_keys: bool) -> str:
    """Return a curl command for what the base does, with an adapter if one of the store fits it."""
    import shlex

    import msgspec

    body: dict[str, object] = {"model": usable(engine) or engine.base.name}
    if engine.base.task != "generate":
        path = {"classify": "classify", "embed": "v1/embeddings"}.get(engine.base.task, "pooling")
        body["input"] = "Hello!"
    elif engine.base.tokenizer.chat_template is None:
        path, body = "v1/completions", body | {"max_tokens": 32, "temperature": 0, "prompt": "Once upon a time"}
    else:
        messages = [{"role": "user", "content": "Hello!"}]
        path, body = "v1/chat/completions", body | {"max_tokens": 32, "temperature": 0, "messages": messages}
    data = shlex.quote(msgspec.json.encode(body).decode())
    key = ' -H "authorization: Bearer $KEY"' if has_keys else ""
    return f"curl {url}/{path} -H 'content-type: application/json'{key} -d {data}"


def usable(engine: "Engine | PoolingEngine") -> str | None:
    """Return the name of an adapter that fits the base, or None if none of the first few does. Load nothing."""
    for stored in engine.store.latest()[:ATTEMPTS] if engine.store else ():
        try:
            engine.adapter_cache.check(stored)
        except LoradeckError:
            continue
        return stored.name
    return None
