"""An application on a socket, served until a signal ends it."""

import asyncio
import ipaddress
import socket
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from loradeck.errors import ConfigError

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from loradeck.api.state import ServerState

GRACE = 5  # seconds after the drain, for the last bytes to leave


class Server(uvicorn.Server):
    """Serves an application on one socket. The first SIGTERM or SIGINT lets running requests finish."""

    def __init__(self, app: "Starlette", sock: socket.socket) -> None:
        self._state: ServerState = app.state.server
        self._socket = sock
        super().__init__(
            uvicorn.Config(
                app,
                log_level="warning",
                lifespan="off",
                ws="none",
                proxy_headers=False,
                server_header=False,
                timeout_graceful_shutdown=round(self._state.config.drain) + GRACE,
            )
        )

    def serve_forever(self) -> None:
        """Serve until a signal or `should_exit`, and the running requests have finished."""
        self.run(sockets=[self._socket])

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more requests, and let the running ones finish."""
        drain = asyncio.create_task(asyncio.to_thread(self._state.drain, self._state.config.drain))
        await super().shutdown(sockets)
        if self.force_exit:
            self._state.release([*self._state.live])
        await drain

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
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error}", hint="Use another port; 0 takes a free one."
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
