"""The application as Ray Serve deploys it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from loradeck.api.service import ServiceConfig
from loradeck.base import SMOLLM2
from loradeck.base.gguf_file import base_name
from loradeck.errors import ConfigError
from loradeck.scale.cluster import check_ray
from loradeck.scale.config import ScaleConfig

NAME = "loradeck"
check_ray("serve")

from ray import serve  # noqa: E402
from ray.serve.config import AutoscalingConfig, HTTPOptions, RequestRouterConfig  # noqa: E402
from ray.serve.schema import LoggingConfig  # noqa: E402

INGRESS_REQUESTS = 10_000  # at an ingress at the same time; each replica has a limit of its own


def app(service: ServiceConfig, scale: ScaleConfig | None = None) -> serve.Application:
    """Return the application: `ray.serve.run(app(ServiceConfig(base=…, adapters=…)), route_prefix="/")`."""
    from loradeck.scale.affinity import AdapterRouter
    from loradeck.scale.ingress import Ingress
    from loradeck.scale.replica import Replica

    scale = scale or ScaleConfig()
    if service.train:
        raise ConfigError("replicas do not train", hint="Train in a server of its own, which publishes in their store.")
    autoscaling = scale.max_replicas and AutoscalingConfig(
        min_replicas=scale.replicas, max_replicas=scale.max_replicas, target_ongoing_requests=service.engine.max_rows
    )
    replicas = serve.deployment(
        Replica,
        name="Replica",
        num_replicas=None if autoscaling else scale.replicas,
        autoscaling_config=autoscaling or None,
        max_ongoing_requests=scale.replica_requests,
        graceful_shutdown_timeout_s=service.server.drain,
        health_check_period_s=2,
        request_router_config=RequestRouterConfig(request_router_class=AdapterRouter),
        ray_actor_options={"num_cpus": scale.replica_cpus, "num_gpus": scale.replica_gpus},
    )
    ingress = serve.deployment(
        Ingress, name="Ingress", max_ongoing_requests=INGRESS_REQUESTS, ray_actor_options={"num_cpus": 0}
    )
    return ingress.bind(replicas.bind(service), name_of(service.base), service.server.max_body_bytes)


def name_of(base: str) -> str:
    """Return the name by which requests ask for a base without an adapter, as `Base.load` gives it."""
    path = Path(base).expanduser()
    if path.is_dir() and base != SMOLLM2:
        return path.resolve().name
    return base_name(path) if path.suffix.lower() == ".gguf" else base


def build(settings: Mapping[str, Any]) -> serve.Application:
    """Return the application that a file of Ray Serve describes: `import_path: loradeck.scale.app:build`, and `args`.

    Args:
        settings: The fields of `ServiceConfig`, and as `scale` those of `ScaleConfig`.

    Raises:
        ConfigError: one is unknown or invalid.
    """
    try:
        scale = msgspec.convert(settings.get("scale", {}), ScaleConfig)
        fields = {name: value for name, value in settings.items() if name != "scale"}
        return app(msgspec.convert(fields, ServiceConfig), scale)
    except msgspec.ValidationError as error:
        raise ConfigError(f"invalid args of the application: {error}") from error


@contextmanager
def served(service: ServiceConfig, scale: ScaleConfig, *, host: str, port: int) -> Iterator[None]:
    """Deploy the application on the cluster, and wait until it answers; remove it at the end of the block.

    Raises:
        ConfigError: the replicas do not start.
    """
    quiet = LoggingConfig(enable_access_log=False)  # a replica's own log has a line for each request
    serve.start(http_options=HTTPOptions(host=host, port=port), logging_config=quiet)
    try:
        serve.run(app(service, scale), name=NAME, route_prefix="/", logging_config=quiet)
    except RuntimeError as error:
        serve.delete(NAME)
        raise ConfigError(f"the replicas do not start: {error}", hint="Their logs say why.") from error
    try:
        yield
    finally:
        serve.delete(NAME)
