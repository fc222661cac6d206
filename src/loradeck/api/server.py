"""An application on a socket, served until a signal ends it."""

import asyncio
import ipaddress
import logging
import socket
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from loradeck.errors import ConfigError

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from loradeck.api.state import ServerState

GRACE = 5  # seconds after the drain, for the last bytes to leave

log = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """Serves an application on one socket. The first SIGTERM or SIGINT lets running requests finish."""

    def __init__(self, app: "Starlette", sock: socket.socket, on_ready: Callable[[], object] = lambda: None) -> None:
        """`on_ready` is called once signals and connections are handled."""
        self._state: ServerState = app.state.server
        self._socket = sock
        self._on_ready = on_ready
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                lifespan="off",
                ws="none",
                proxy_headers=False,
                server_header=False,
            )
        )

    def serve_forever(self) -> None:
        """Serve until a signal or `should_exit`, and the running requests have finished."""
        self.run(sockets=[self._socket])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept connections, and look for adapters that cannot be served."""
        await super().startup(sockets)
        self._on_ready()
        self._check = asyncio.create_task(asyncio.to_thread(self._state.catalogue.log_problems))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more requests, and let the running ones finish."""
        started, drain = time.monotonic(), self._state.config.drain
        log.info(
            "shutting down: %(running)d answers in progress have %(seconds)g s",
            {"running": len(self._state.live), "seconds": drain},
        )
        self._state.stop_reading()
        draining = asyncio.create_task(self._drain(started + drain))
        closing = asyncio.create_task(super().shutdown(sockets))
        await asyncio.wait((draining, closing), return_when=asyncio.FIRST_COMPLETED)
        if closing.done():  # all answers are sent, or a second signal came
            self._state.release([*self._state.live])
        else:
            await asyncio.wait((closing,), timeout=GRACE)
        for connection in [*self.server_state.connections]:  # of clients that do not read their answers
            connection.transport.abort()
        if self.server_state.tasks:
            await asyncio.wait([*self.server_state.tasks], timeout=GRACE)
        await asyncio.gather(draining, closing)
        await asyncio.wait((self._check,))
        log.info("shut down after %(seconds).1f s", {"seconds": time.monotonic() - started})

    async def _drain(self, deadline: float) -> None:
        """Wait for all that runs to be answered."""
        await asyncio.to_thread(self._state.drain, deadline - time.monotonic())
        while self._state.unanswered and time.monotonic() < deadline and not self.force_exit:  # such as a slow load
            await asyncio.sleep(0.05)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Shut down gracefully at the first signal, at once at the second. The process then exits by itself."""
        self.force_exit = self.should_exit
        self.should_exit = True


def listen(host: str, port: int, *, has_keys: bool) -> socket.socket:
    """Return a listening socket; connections wait until the server runs. Port 0 takes a free one.

    Raises:
        ConfigError: the address cannot be used, or other machines could reach it although no keys are set.
    """
    if not has_keys and not is_loopback(host):
        raise ConfigError(
            f"without API keys, anyone who reaches {host} could control the server",
            hint="Listen on 127.0.0.1, or give a file of API keys.",
            cli="As in --keys FILE.",
        )
    try:
        if not 0 <= port < 1 << 16:
            raise OverflowError("a port is a number from 0 to 65535")
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        why = (getattr(error, "strerror", None) or str(error)).partition(" (while")[0]  # Python names the address again
        raise ConfigError(
            f"cannot listen on {host}:{port}: {why}", hint="Use another port; 0 takes a free one."
        ) from error


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def url_of(sock: socket.socket) -> str:
    """Return the URL of a listening socket, as seen from this machine."""
    host, port = sock.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = "localhost"
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
