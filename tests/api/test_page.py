"""The page at `/` and its files, which a browser may have without a key, and the rights of a key."""

import hashlib
from collections.abc import Iterator

import httpx
import pytest

from loradeck.api.auth import ApiKey, ApiKeys
from loradeck.api.page import INDEX, page_files

from .conftest import LocalServer

KEYS = ApiKeys(
    [
        ApiKey("alice", hashlib.sha256(b"ka").hexdigest(), ("poet", "team-*"), train=True, create=("mine-*",)),
        ApiKey("operator", hashlib.sha256(b"ko").hexdigest(), control=True),
    ]
)


def urls() -> Iterator[tuple[str, str]]:
    yield "/", INDEX
    yield from ((f"/page/{name}", name) for name in page_files())


def test_the_page_needs_no_key(server: LocalServer) -> None:
    async def test(client: httpx.AsyncClient) -> None:
        for url, name in urls():
            answer = await client.get(url)
            assert answer.status_code == 200
            assert answer.content == page_files()[name].content

    server.configured(keys=KEYS).run(test)
    assert server.configured(keys=KEYS).request("/v1/key").status_code == 401
    assert server.configured(keys=KEYS).request("/v1/models").status_code == 401


@pytest.mark.parametrize(
    ("url", "media_type"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/page/index.html", "text/html; charset=utf-8"),
        ("/page/app.js", "text/javascript; charset=utf-8"),
        ("/page/page.css", "text/css; charset=utf-8"),
        ("/page/icon.svg", "image/svg+xml"),
    ],
)
def test_each_file_has_its_media_type_and_the_policy(server: LocalServer, url: str, media_type: str) -> None:
    answer = server.request(url)
    assert answer.headers["content-type"] == media_type
    assert answer.headers["x-content-type-options"] == "nosniff"
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert {policy[f"{kind}-src"] for kind in ("script", "style", "img", "connect")} == {"'self'"}
    assert "unsafe" not in answer.headers["content-security-policy"]


def test_files_are_compressed_for_those_who_read_that(server: LocalServer) -> None:
    lengths = {}
    for encoding in ("gzip, br", "identity"):

        async def test(client: httpx.AsyncClient, encoding: str = encoding) -> httpx.Response:
            return await client.get("/page/app.js", headers={"accept-encoding": encoding})

        answer = server.run(test)
        assert answer.content == page_files()["app.js"].content
        assert answer.headers["vary"] == "accept-encoding"
        lengths[answer.headers.get("content-encoding")] = int(answer.headers["content-length"])
    assert lengths["gzip"] < lengths[None] == len(page_files()["app.js"].content)


def test_an_unchanged_file_is_not_sent_again(server: LocalServer) -> None:
    first = server.request("/page/app.js")
    assert first.headers["cache-control"] == "no-cache"

    async def ask_again(client: httpx.AsyncClient) -> list[httpx.Response]:
        tags = (first.headers["etag"], '"another"')
        return [await client.get("/page/app.js", headers={"if-none-match": tag}) for tag in tags]

    same, changed = server.run(ask_again)
    assert (same.status_code, same.content, same.headers["etag"]) == (304, b"", first.headers["etag"])
    assert same.headers["content-security-policy"] == first.headers["content-security-policy"]
    assert (changed.status_code, changed.content) == (200, first.content)


@pytest.mark.parametrize("name", ["nothing.js", "__init__.py", "..%2fapi%2fapp.py", "%2e%2e/errors.py", "../auth.py"])
def test_only_the_files_of_the_page_are_sent(server: LocalServer, name: str) -> None:
    answer = server.request(f"/page/{name}")
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/json"


def test_a_foreign_host_gets_no_page(server: LocalServer) -> None:
    """A name that an attacker points to this machine: else their page could read this server's answers."""

    async def test(client: httpx.AsyncClient) -> list[int]:
        paths = ("/", "/page/app.js", "/v1/key")
        return [(await client.get(path, headers={"host": "evil.example"})).status_code for path in paths]

    assert server.run(test) == [400, 400, 400]


def test_the_rights_of_a_key(server: LocalServer) -> None:
    assert server.request("/v1/key").json() == {
        "object": "key",
        "name": "",
        "required": False,
        "base": "tiny",
        "task": "generate",
        "adapters": ["*"],
        "create": ["*"],
        "control": True,
        "train": False,
        "store": True,
    }
    server = server.configured(keys=KEYS)
    alice = server.request("/v1/key", key="ka").json()
    assert (alice["name"], alice["required"], alice["control"]) == ("alice", True, False)
    assert (alice["adapters"], alice["create"], alice["train"]) == (["poet", "team-*"], ["mine-*"], False)
    operator = server.request("/v1/key", key="ko").json()
    assert (operator["name"], operator["control"], operator["create"]) == ("operator", True, ["*"])


def test_a_server_that_trains_says_so(training_server: LocalServer) -> None:
    assert training_server.request("/v1/key").json()["train"]
