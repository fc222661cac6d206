"""A real S3 server on this machine (moto's), and in front of it a proxy that brings faults."""

import http.client
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Lock, Thread
from typing import Literal
from urllib.parse import urlsplit

SKEWED = b"""<?xml version="1.0" encoding="UTF-8"?><Error><Code>RequestTimeTooSkewed</Code>
<Message>The difference between the request time and the current time is too large.</Message></Error>"""
DENIED = b"""<?xml version="1.0" encoding="UTF-8"?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"""
BUSY = b"""<?xml version="1.0" encoding="UTF-8"?><Error><Code>SlowDown</Code><Message>Reduce your rate.</Message></Error>"""
ANSWERS = {"busy": (503, BUSY), "denied": (403, DENIED), "skewed": (403, SKEWED)}


@dataclass
class Fault:
    """What happens to requests that a pattern matches, as METHOD /path."""

    kind: Literal["slow", "hang", "busy", "cut", "wrong", "denied", "skewed", "lost"]
    pattern: str
    times: int = 1_000_000
    seconds: float = 0.0
    seen: int = 0
    gate: Event = field(default_factory=Event)
    """Ends a hang."""


@dataclass
class Faults:
    """The faults of a proxy, and the requests that it saw."""

    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    lock: Lock = field(default_factory=Lock)

    def add(self, fault: Fault) -> Fault:
        self.faults.append(fault)
        return fault

    def next(self, request: str) -> Fault | None:
        with self.lock:
            self.requests.append(request)
            for fault in self.faults:
                if fault.seen < fault.times and re.search(fault.pattern, request):
                    fault.seen += 1
                    return fault
        return None


class Handler(BaseHTTPRequestHandler):
    """Passes requests on, or not."""

    protocol_version = "HTTP/1.1"
    faults: Faults
    target: str

    def do_GET(self) -> None:
        body = self.body()
        fault = self.faults.next(f"{self.command} {self.path}")
        kind = fault.kind if fault else ""
        if fault and kind == "slow":
            time.sleep(fault.seconds)
        if fault and kind == "hang":
            fault.gate.wait()
        if kind in ANSWERS:
            self.send(*ANSWERS[kind], [])
            return
        server = http.client.HTTPConnection(self.target)
        server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in ("transfer-encoding", "content-length", "expect"):
                server.putheader(name, value)
        server.putheader("Content-Length", str(len(body)))
        server.endheaders(body)
        answer = server.getresponse()
        content = answer.read()
        server.close()
        if kind == "lost":
            self.close_connection = True
            return
        if kind == "wrong" and content:
            content = content[:-1] + bytes([content[-1] ^ 1])
        self.send(answer.status, content, answer.getheaders(), cut=kind == "cut")

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815

    def body(self) -> bytes:
        if self.headers.get("transfer-encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("content-length") or 0))
        parts = []
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(parts)

    def send(self, status: int, content: bytes, headers: list[tuple[str, str]], cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "x-amz-checksum-crc32"):
                self.send_header(name, value)
        length = dict(headers).get("Content-Length", "0") if self.command == "HEAD" else str(len(content))
        self.send_header("Content-Length", length)
        self.end_headers()
        if cut:
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
        else:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that goes away in the middle of an answer is no error here."""


@contextmanager
def s3_server() -> Iterator[str]:
    """Serve S3 from memory; yield the address."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@contextmanager
def proxy(target: str) -> Iterator[tuple[Faults, str]]:
    """Serve a proxy for a server; yield its faults, none yet, and its address."""
    faults = Faults()
    handler = type("ThisHandler", (Handler,), {"faults": faults, "target": urlsplit(target).netloc})
    with Server(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield faults, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()
