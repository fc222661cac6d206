"""A relay before a server: the page's requests pass, but for generations, which a test answers as it likes."""

import contextlib
import http.client
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

TIMEOUT = 600.0  # seconds; only a deadlock takes as long
PASSED = ("content-type", "content-security-policy", "cache-control", "etag")


@dataclass
class Exchange:
    """One request for a generation."""

    path: str
    body: dict[str, Any]
    handler: BaseHTTPRequestHandler = field(repr=False)

    def begin(self) -> None:
        """Begin a stream of events."""
        self.handler.send_response(200)
        self.handler.send_header("content-type", "text/event-stream; charset=utf-8")
        self.handler.end_headers()

    def send(self, *texts: str, finish: str | None = None) -> None:
        """Send texts, a token each, in the form that was asked for."""
        for text in texts:
            self._send({"delta": {"content": text}, "text": text, "token_ids": [len(text)], **self._logprobs(text)})
        if finish:
            self._send({"delta": {}, "text": "", "finish_reason": finish})
            self.handler.wfile.write(b"data: [DONE]\n\n")

    def _logprobs(self, text: str) -> dict[str, Any]:
        if "messages" not in self.body:
            return {"logprobs": {"tokens": [text], "token_logprobs": [-0.1], "top_logprobs": [{text: -0.1}]}}
        top = [{"token": text, "logprob": -0.1}, {"token": "other", "logprob": -2.5}]
        return {"logprobs": {"content": [{"token": text, "logprob": -0.1, "top_logprobs": top}]}}

    def _send(self, choice: dict[str, Any]) -> None:
        event = {"choices": [{"index": 0, **choice}], "prompt_token_ids": [1, 2, 3]}
        self.handler.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.handler.wfile.flush()


class Relay:
    """Listens on a port of its own; `answer` gets every `POST` of a generation, and runs in a thread of its own."""

    def __init__(self, url: str, answer: Callable[["Relay", Exchange], None]) -> None:
        self.exchanges: list[Exchange] = []
        self.released = threading.Event()
        self._answer = answer
        self._target = urlsplit(url).netloc
        relay = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                relay.forward(self, b"")

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if not self.path.endswith("completions"):
                    relay.forward(self, body)
                    return
                exchange = Exchange(self.path, json.loads(body), self)
                relay.exchanges.append(exchange)
                with contextlib.suppress(ConnectionError):  # the page has stopped it
                    relay._answer(relay, exchange)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def forward(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        """Pass a request on, and its response back once it is complete."""
        connection = http.client.HTTPConnection(self._target, timeout=TIMEOUT)
        connection.request(handler.command, handler.path, body or None, {"content-type": "application/json"})
        response = connection.getresponse()
        content = response.read()
        handler.send_response(response.status)
        for name in PASSED:
            if value := response.getheader(name):
                handler.send_header(name, value)
        handler.send_header("content-length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)
        connection.close()

    def close(self) -> None:
        """Stop listening, and let all that waits end."""
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def tokens(text: str) -> Sequence[str]:
    """Return a text in tokens of up to four characters."""
    return [text[at : at + 4] for at in range(0, len(text), 4)]
