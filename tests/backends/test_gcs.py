"""A store on a server of Google's HTTP API, of which an emulator runs here; it has no conditional write, so a proxy adds it.

gcsfs asks a real bucket's kind by gRPC, which the emulator does not know; that is switched off.
"""

import http.client
import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from threading import Lock, Thread
from urllib.parse import quote

import pytest
from tests.backends.s3_server import Server
from tests.test_store import adapter

from loradeck.errors import AdapterError
from loradeck.store import AdapterStore

WHY = "needs `pip install --group stores` (gcsfs and an emulator of Google's storage)"
URL = "gs://bucket/adapters"


class Handler(BaseHTTPRequestHandler):
    """Passes requests on, and refuses to write over an object if the client says so."""

    protocol_version = "HTTP/1.1"
    port: int
    refused: list[str]
    lock: Lock

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        with self.lock:
            if "ifGenerationMatch=0" in self.path:
                match = re.search(rb'"name": ?"([^"]+)"', body)
                assert match
                name = match[1].decode()
                if self.ask("GET", f"/storage/v1/b/bucket/o/{quote(name, safe='')}", b"")[0] == 200:
                    self.refused.append(name)
                    self.answer(412, b"{}", [])
                    return
            self.answer(*self.ask(self.command, self.path, body))

    do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815

    def ask(self, method: str, path: str, body: bytes) -> tuple[int, bytes, list[tuple[str, str]]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
        connection.request(method, path, body, {**headers, "Content-Length": str(len(body))})
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, content, answer.getheaders()

    def answer(self, status: int, content: bytes, headers: list[tuple[str, str]]) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A server with one empty bucket; the names of the objects that it refused to write over."""
    pytest.importorskip("gcsfs", reason=WHY)
    emulator = pytest.importorskip("gcp_storage_emulator.server", reason=WHY)
    server = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    server.start()
    refused: list[str] = []
    state = {"port": server._api._httpd.server_port, "refused": refused, "lock": Lock()}
    with Server(("127.0.0.1", 0), type("ThisHandler", (Handler,), state)) as proxy:
        thread = Thread(target=proxy.serve_forever, daemon=True)
        thread.start()
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{proxy.server_port}")
        monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        yield refused
        proxy.shutdown()
        thread.join()
    server.stop()


def test_it_is_a_store(refused: list[str]) -> None:
    store = AdapterStore(URL)
    assert store.names() == []
    digests = [store.publish("poet", adapter(r)).sha256() for r in (2, 3)]
    other = AdapterStore(URL)
    assert [other.find(f"poet@{number}").sha256() for number in (1, 2)] == digests
    assert [stored.spec for stored in other.latest()] == ["poet@2"]
    assert other.remove("poet@2") == [2]
    assert AdapterStore(URL).versions("poet") == [1]
    assert AdapterStore(URL).publish("poet", adapter(4)).version == 3
    with pytest.raises(AdapterError, match=r"gs://nobody/adapters is not there"):
        AdapterStore("gs://nobody/adapters").names()


def test_a_number_that_is_taken_meanwhile_is_not_taken_again(
    refused: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server refuses the second (ifGenerationMatch=0)."""
    store, other = AdapterStore(URL), AdapterStore(URL)
    create = store._backend.place.create

    def after_another(path: str, content: bytes) -> bool:
        monkeypatch.setattr(store._backend.place, "create", create)
        assert other.publish("poet", adapter(3)).version == 1
        return create(path, content)

    monkeypatch.setattr(store._backend.place, "create", after_another)
    assert store.publish("poet", adapter(2)).version == 2
    assert refused == ["adapters/.versions/poet/1.json"]
    assert [store.find(f"poet@{number}").facts.r for number in (1, 2)] == [3, 2]
