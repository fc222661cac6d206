"""What a foreign web page can make a browser send: nothing of it may have an effect."""

from typing import Any

import httpx
import pytest

from loradeck import AdapterStore
from loradeck.api.app import OPERATIONS
from loradeck.api.config import ServerConfig

from .conftest import LocalServer

EVIL, FRIEND = "https://evil.example", "https://pages.example"
CHANGES = [
    (each.method, each.route.path_format.format(id="poet"))
    for each in OPERATIONS
    if each.method != "GET" and (not each.tasks or "generate" in each.tasks)  # others are refused by their task
]
SIMPLE = ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "")
"""Content types that a page may send to any server without a question of the browser's; "" is none."""


@pytest.mark.parametrize("origin", [EVIL, "null", "http://[", "http://localhost:1234"])
def test_nothing_that_a_browser_sends_unasked_is_let_in(training_server: LocalServer, origin: str) -> None:
    async def test(client: httpx.AsyncClient) -> None:
        for method, path in CHANGES:
            for kind in SIMPLE:
                headers = {"origin": origin} | ({"content-type": kind} if kind else {})
                answer = await client.request(method, path, content=b"{}", headers=headers)
                message = answer.json()["error"]["message"]
                assert (answer.status_code, "may not use this server" in message) in ((403, True), (415, False)), path
                assert answer.status_code == 403 or "must be application/json" in message, path
                assert "access-control-allow-origin" not in answer.headers

    training_server.run(test)


def test_a_browser_that_asks_is_told_no(server: LocalServer) -> None:
    """So it sends neither a DELETE nor JSON."""

    async def test(client: httpx.AsyncClient) -> None:
        for method, path in CHANGES:
            preflight = {"access-control-request-method": method, "access-control-request-headers": "content-type"}
            answer = await client.options(path, headers={"origin": EVIL, **preflight})
            assert answer.status_code >= 400, path
            assert "access-control-allow-origin" not in answer.headers

    server.run(test)
    server.configured(config=ServerConfig(origins=(FRIEND,))).run(test)


def test_pages_of_this_server_and_of_origins_may_change_things(server: LocalServer, store: AdapterStore) -> None:
    server = server.configured(config=ServerConfig(origins=(FRIEND,)))
    for version, origin in enumerate(("http://localhost", FRIEND), 1):
        headers, body = {"origin": origin}, {"lora_name": "poet", "load_inplace": True}

        async def test(client: httpx.AsyncClient, version: int = version, headers: Any = headers) -> list[int]:
            loaded = await client.post("/v1/load_lora_adapter", json=body, headers=headers)  # noqa: B023
            removed = await client.delete(f"/v1/models/poet@{version}", headers=headers)
            return [loaded.status_code, removed.status_code]

        assert server.run(test) == [200, 200]
    assert "poet" not in store.names()


def test_a_foreign_page_removes_nothing(server: LocalServer, store: AdapterStore) -> None:
    answer = server.run(lambda client: client.delete("/v1/models/poet", headers={"origin": EVIL}))
    assert answer.status_code == 403
    assert store.versions("poet") == [1, 2]
