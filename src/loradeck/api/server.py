"""An app on a socket until it is told to end. Knows uvicorn and addresses, no route."""

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

GRACE = 5  # seconds beyond the drain, for the last bytes to leave


class Server(uvicorn.Server):
    """Serves an app on one address; SIGTERM and SIGINT let running requests end, a second one does not."""

    def __init__(self, app: "Starlette", address: socket.socket) -> None:
        self._door: ServerState = app.state.door
        self._address = address
        super().__init__(
            uvicorn.Config(
                app,
                log_level="warning",
                lifespan="off",
                ws="none",
                proxy_headers=False,
                server_header=False,
                timeout_graceful_shutdown=round(self._door.settings.drain) + GRACE,
            )
        )

    def serve_here(self) -> None:
        """Serve until a signal, or `should_exit`, ends it; then running requests have had time to end."""
        self.run(sockets=[self._address])

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take nothing new, let what runs end."""
        drained = asyncio.create_task(asyncio.to_thread(self._door.drain, self._door.settings.drain))
        await super().shutdown(sockets)
        if self.force_exit:
            self._door.release([*self._door.live])
        await drained

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """End gracefully at the first signal, at once at the second; the process goes on to its own end."""
        self.force_exit = self.should_exit
        self.should_exit = True


def listen(host: str, port: int, *, guarded: bool) -> socket.socket:
    """Take an address, before anything slow is done; who asks at once is answered later. Port 0 takes a free one.

    Raises:
        ConfigError: the address cannot be had; or others could reach it, though no keys guard it.
    """
    if not guarded and not is_loopback(host):
        hint = "Give API keys, or listen on 127.0.0.1."
        raise ConfigError(f"without API keys anyone who reaches {host} could do anything", hint=hint)
    try:
        if not 0 <= port < 1 << 16:
            raise OverflowError("a port is a number below 65536")
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        hint = "Take another port; 0 finds a free one."
        raise ConfigError(f"{host}:{port} cannot be listened on: {error}", hint=hint) from error


def is_loopback(host: str) -> bool:
    """Say whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def url_of(address: socket.socket) -> str:
    """Return the URL by which this machine reaches an address."""
    host, port = address.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = "localhost"
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
