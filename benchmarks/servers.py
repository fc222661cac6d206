"""Servers of OpenAI's protocol, from their start on."""

import socket
import subprocess
import time
from collections.abc import Sequence

import httpx


def first_answer(command: Sequence[str], model: str) -> float:
    """Start a server, and return the seconds until it has answered with a token.

    Raises:
        RuntimeError: it has ended before.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, body = f"http://127.0.0.1:{port}/v1/completions", {"model": model, "prompt": "Hello", "max_tokens": 1}
    options = ["--host", "127.0.0.1", "--port", str(port)]
    begin = time.perf_counter()
    with subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            while process.poll() is None:
                try:
                    httpx.post(url, json=body, timeout=600).raise_for_status()
                    return time.perf_counter() - begin
                except httpx.ConnectError:
                    time.sleep(0.002)
            raise RuntimeError(f"{' '.join(command)} ended with code {process.returncode}")
        finally:
            process.terminate()
