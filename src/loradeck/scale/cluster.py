"""A Ray cluster: one that is joined, or one that is started on this machine."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec

from loradeck.errors import ConfigError

OLDEST = (2, 50)  # of Ray: routers of our own
NEEDS = {"serve": "starlette", "train": "pyarrow"}  # of Ray's parts, a package that comes with each
TIMEOUT = 10  # seconds to reach a cluster


def check_ray(part: str) -> None:
    """Check that Ray and one of its parts are installed.

    Raises:
        ConfigError: they are not, or Ray is too old.
    """
    wanted = f"pip install 'ray[{part}]>={OLDEST[0]}.{OLDEST[1]}'"
    if find_spec("ray") is None or find_spec(NEEDS[part]) is None:
        raise ConfigError(f"Ray {part.capitalize()} is not installed", hint=f"Run {wanted}")
    if tuple(int(number) for number in version("ray").split(".")[:2]) < OLDEST:
        raise ConfigError(f"Ray {version('ray')} is too old", hint=f"Run {wanted}")


@contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Connect to a Ray cluster, or start one on this machine; leave it at the end of the block.

    Raises:
        ConfigError: it cannot be reached.
    """
    import ray

    try:
        if address and address not in ("auto", "local"):  # to which Ray would try to connect for minutes
            host, _, port = address.removeprefix("ray://").rpartition(":")
            socket.create_connection((host, int(port)), TIMEOUT).close()
        ray.init(address=address, include_dashboard=False if address is None else None, log_to_driver=True)
    except (OSError, RuntimeError, ValueError) as error:
        where = address or os.environ.get("RAY_ADDRESS") or "this machine"
        raise ConfigError(
            f"no Ray cluster at {where}: {str(error).strip().partition(chr(10))[0]}",
            hint="Leave the address out to start one here.",
            cli="Or start one with `ray start --head`, and give --ray-address HOST:PORT.",
        ) from error
    try:
        yield
    finally:
        ray.shutdown()
