"""OpenAI's files through its client: uploads that arrive whole, in part, too large, or from others."""

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from loradeck.api.auth import ApiKey, ApiKeys
from loradeck.api.config import ServerConfig
from loradeck.live.config import LiveConfig
from loradeck.live.records import Quota
from loradeck.live.uploads import Upload, Uploads

from .conftest import TIMEOUT, LocalServer, until

DATA = b'{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}\n'
FORM = {"content-type": "multipart/form-data; boundary=x"}
PURPOSE = b'--x\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
FILE = b'--x\r\ncontent-disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


KEYS = ApiKeys(
    [
        ApiKey("alice", sha("ka"), train=True, quota=Quota(max_upload_bytes=1000)),
        ApiKey("bob", sha("kb"), train=True),
        ApiKey("carol", sha("kc")),
    ]
)


@contextmanager
def client_of(server: LocalServer, key: str = "none") -> Iterator[openai.OpenAI]:
    with (
        server.listening() as (url, _),
        openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=TIMEOUT) as client,
    ):
        yield client


def leftovers(server: LocalServer) -> list[Path]:
    uploads: Uploads = server.options["training"].uploads
    listed = {record.id for owner in ("", "alice", "bob") for record in uploads.list(owner)[0]}
    return [path for path in uploads._folder.iterdir() if path.name not in listed]


def test_a_file_with_openais_client(training_server: LocalServer, tmp_path: Path) -> None:
    path = tmp_path / "poems.jsonl"
    path.write_bytes(DATA)
    with client_of(training_server) as client:
        file = client.files.create(file=path, purpose="fine-tune")
        assert file.id.startswith("file-")
        assert (file.filename, file.bytes, file.purpose, file.object) == ("poems.jsonl", len(DATA), "fine-tune", "file")
        assert file.status == "processed"
        assert client.files.retrieve(file.id) == file
        assert client.files.content(file.id).read() == DATA
        others = [client.files.create(file=(f"{n}.jsonl", DATA), purpose="fine-tune").id for n in range(3)]
        newest_first = [*others[::-1], file.id]
        assert [each.id for each in client.files.list()] == newest_first
        assert [each.id for each in client.files.list(limit=1)] == newest_first  # page after page
        assert [each.id for each in client.files.list(order="asc", limit=3)] == newest_first[::-1]
        assert client.files.list(purpose="batch").data == []
        assert client.files.wait_for_processing(file.id) == file
        deleted = client.files.delete(file.id)
        assert (deleted.id, deleted.deleted) == (file.id, True)
        for call in (client.files.retrieve, client.files.content, client.files.delete):
            with pytest.raises(openai.NotFoundError, match=f"there is no file '{file.id}'"):
                call(file.id)
        with pytest.raises(openai.NotFoundError):
            client.files.list(after=file.id)


def test_a_large_file_goes_to_the_disk_piece_by_piece(
    training_server: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Larger than max_body_bytes, which is for JSON."""
    sizes: list[int] = []
    write = Upload.write

    def watch(self: Any, content: bytes) -> None:
        sizes.append(len(content))
        write(self, content)

    monkeypatch.setattr("loradeck.live.uploads.Upload.write", watch)
    content = DATA * 100_000
    server = training_server.configured(**training_server.options, config=ServerConfig(max_body_bytes=1000))
    with client_of(server) as client:
        file = client.files.create(file=("big.jsonl", content), purpose="fine-tune")
        assert file.bytes == len(content) == sum(sizes)
        assert max(sizes) < 1 << 20
        assert client.files.content(file.id).read() == content


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (PURPOSE + FILE + b"\r\n--x--\r\n", 400, "'a.jsonl' is empty"),
        (PURPOSE + FILE + b"abc", 400, "incomplete"),
        (PURPOSE + b"--x--\r\n", 400, "has no file"),
        (FILE + b"abc\r\n--x--\r\n", 400, "purpose is missing"),
        (FILE + b"abc\r\n" + PURPOSE.replace(b"fine-tune", b"batch") + b"--x--\r\n", 400, "purpose='batch'"),
        (FILE + b"abc\r\n" + FILE + b"abc\r\n" + PURPOSE + b"--x--\r\n", 400, "two files"),
        (PURPOSE.replace(b"purpose", b"expires_after[anchor]") + PURPOSE + FILE + b"abc\r\n--x--\r\n", 400, "expires"),
        (b"no form at all", 400, "no valid form"),
        (b"--x\r\n\r\nabc\r\n--x--\r\n", 400, "no name"),
        (b"", 400, "incomplete"),
        (PURPOSE * 20, 200, ""),
        (PURPOSE.replace(b"fine-tune", b"a" * 5000) + b"--x--\r\n", 413, "4096 bytes"),
        (b"--x\r\n" + b"a: b\r\n" * 10_000, 400, "no valid form"),
        (FILE + b"1" * 200 + b"\r\n" + PURPOSE + b"--x--\r\n", 413, "'a.jsonl' is larger than 100 bytes"),
    ],
)
def test_a_bad_upload_is_one_clear_error_and_leaves_nothing(
    training_server: LocalServer, body: bytes, status: int, says: str
) -> None:
    training_server.options["training"].config = LiveConfig(max_file_bytes=100)
    if status == 200:  # a field that is sent again counts once
        body += FILE + b"abc\r\n--x--\r\n"
    response = training_server.run(lambda client: client.post("/v1/files", content=body, headers=FORM))
    assert response.status_code == status, response.text
    if says:
        assert says in response.json()["error"]["message"]
        assert not training_server.options["training"].uploads.list("")[0]
    assert not leftovers(training_server)


def test_a_file_that_is_too_large_is_told_before_it_arrives(training_server: LocalServer) -> None:
    training_server.options["training"].config = LiveConfig(max_file_bytes=100_000)
    with client_of(training_server) as client:
        for size, says in ((150_000, "'a.jsonl' is larger than 100000 bytes"), (5_000_000, "a file may have 100000")):
            with pytest.raises(openai.APIStatusError, match=says) as error:
                client.files.create(file=("a.jsonl", b"1" * size), purpose="fine-tune")
            assert error.value.status_code == 413
        assert not leftovers(training_server)


@pytest.mark.parametrize(
    ("headers", "status", "says"),
    [
        ({"content-type": "application/json"}, 415, "multipart/form-data"),
        ({"content-type": "multipart/form-data"}, 400, "boundary"),
        ({**FORM, "content-encoding": "gzip"}, 415, "compressed"),
        ({**FORM, "origin": "https://evil.example"}, 403, "evil.example"),
        ({**FORM, "origin": "null"}, 403, "null"),
        ({"content-type": "multipart/form-data; boundary=" + "x" * 300}, 400, "no valid form"),
    ],
)
def test_a_bad_header_is_refused(training_server: LocalServer, headers: dict[str, str], status: int, says: str) -> None:
    body = PURPOSE + FILE + b"abc\r\n--x--\r\n"
    response = training_server.run(lambda client: client.post("/v1/files", content=body, headers=headers))
    assert response.status_code == status, response.text
    assert says in response.json()["error"]["message"]
    assert not leftovers(training_server)


@pytest.mark.parametrize("origin", ["http://localhost", "https://pages.example"])
def test_pages_of_this_server_and_of_origins_may_upload(training_server: LocalServer, origin: str) -> None:
    body = PURPOSE + FILE + b"abc\r\n--x--\r\n"
    server = training_server.configured(
        **training_server.options, config=ServerConfig(origins=("https://pages.example",))
    )
    headers = {**FORM, "origin": origin}
    assert server.run(lambda client: client.post("/v1/files", content=body, headers=headers)).status_code == 200


def test_a_full_disk_is_told_before_the_file_arrives(
    training_server: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 10

    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage)
    with client_of(training_server) as client:
        with pytest.raises(openai.InternalServerError, match="no room") as error:
            client.files.create(file=("a.jsonl", DATA), purpose="fine-tune")
        assert error.value.status_code == 507
        assert error.value.response.headers["x-should-retry"] == "false"


async def begin_upload(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Send a part of an upload."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = "POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\n"
    writer.write(f"{head}Content-Length: 1000000\r\n\r\n".encode() + PURPOSE + FILE + b"1" * 1000)
    return reader, writer


def test_a_client_that_leaves_half_way_leaves_nothing(training_server: LocalServer) -> None:
    async def main(url: str, leave: Callable[[asyncio.StreamWriter], None]) -> None:
        _, writer = await begin_upload(url)
        await until(lambda: leftovers(training_server))
        leave(writer)
        await until(lambda: not leftovers(training_server))
        writer.close()

    with training_server.listening() as (url, _):
        asyncio.run(main(url, lambda writer: writer.close()))
        asyncio.run(main(url, lambda writer: writer.write_eof()))
        assert not training_server.options["training"].uploads.list("")[0]


def test_a_shutdown_ends_a_half_upload(training_server: LocalServer) -> None:
    async def main(reader: asyncio.StreamReader) -> None:
        assert b"503 Service Unavailable" in await reader.readline()

    with asyncio.Runner() as runner:
        with training_server.listening() as (url, _):
            reader, writer = runner.run(begin_upload(url))
            runner.run(until(lambda: leftovers(training_server)))
        runner.run(main(reader))
        writer.close()
    assert not [*training_server.options["training"].uploads._folder.iterdir()]


def test_a_slow_upload_stops_no_stream(training_server: LocalServer) -> None:
    async def main(url: str) -> None:
        release = asyncio.Event()

        async def body() -> AsyncIterator[bytes]:
            yield PURPOSE + FILE
            for _ in range(3):
                yield b"1"
                await release.wait()
            yield b"\r\n--x--\r\n"

        async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT) as client:
            upload = asyncio.create_task(client.post("/v1/files", content=body(), headers=FORM))
            await until(lambda: leftovers(training_server))
            chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "stream": True}
            response = await client.post("/v1/chat/completions", json=chat)
            assert response.text.endswith("data: [DONE]\n\n")
            assert not upload.done()
            release.set()
            assert (await upload).json()["bytes"] == 3

    with training_server.listening() as (url, _):
        asyncio.run(main(url))


def test_a_slow_disk_stops_no_stream(training_server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk takes the upload's first piece only once a stream has run to its end."""
    answered = threading.Event()
    write = Upload.write

    def write_slowly(self: Any, content: bytes) -> None:
        assert answered.wait(TIMEOUT)
        write(self, content)

    monkeypatch.setattr("loradeck.live.uploads.Upload.write", write_slowly)

    async def main(url: str) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT) as client:
            body = PURPOSE + FILE + b"1\r\n--x--\r\n"
            upload = asyncio.create_task(client.post("/v1/files", content=body, headers=FORM))
            await until(lambda: leftovers(training_server))
            chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "stream": True}
            assert (await client.post("/v1/chat/completions", json=chat)).text.endswith("data: [DONE]\n\n")
            answered.set()
            assert (await upload).json()["bytes"] == 1

    with training_server.listening() as (url, _):
        asyncio.run(main(url))


def test_a_key_sees_its_own_files(training_server: LocalServer) -> None:
    server = training_server.configured(**training_server.options, keys=KEYS)
    with server.listening() as (url, _):
        alice, bob, carol = (
            openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) for key in ("ka", "kb", "kc")
        )
        with alice, bob, carol:
            file = alice.files.create(file=("a.jsonl", DATA), purpose="fine-tune")
            assert bob.files.list().data == []
            for call in (bob.files.retrieve, bob.files.content, bob.files.delete):
                with pytest.raises(openai.NotFoundError, match="there is no file"):
                    call(file.id)
            assert alice.files.retrieve(file.id) == file
            with pytest.raises(openai.PermissionDeniedError, match="may not train") as error:
                carol.files.create(file=("a.jsonl", DATA), purpose="fine-tune")
            assert "train = true" in error.value.message
            with pytest.raises(openai.PermissionDeniedError):
                carol.files.list()
            with pytest.raises(openai.APIStatusError, match="more than 1000 bytes of all your files") as large:
                alice.files.create(file=("b.jsonl", b"1" * 950), purpose="fine-tune")
            assert large.value.status_code == 413
            bob.files.create(file=("b.jsonl", b"1" * 5000), purpose="fine-tune")
            assert [each.id for each in alice.files.list()] == [file.id]


def test_content_is_never_a_page(training_server: LocalServer) -> None:
    async def test(client: httpx.AsyncClient) -> httpx.Response:
        body = PURPOSE + FILE.replace(b"a.jsonl", "ü.html".encode()) + b"<script>\r\n--x--\r\n"
        file = (await client.post("/v1/files", content=body, headers=FORM)).json()
        return await client.get(f"/v1/files/{file['id']}/content")

    response = training_server.run(test)
    assert response.headers["content-type"] == "application/octet-stream"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["content-disposition"].startswith("attachment;")


@pytest.mark.parametrize("query", ["limit=0", "limit=x", "limit=10001", "order=up", "after=", f"after={'x' * 200}"])
def test_a_bad_parameter_is_named(training_server: LocalServer, query: str) -> None:
    response = training_server.request(f"/v1/files?{query}")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == query.partition("=")[0]


def test_a_server_that_does_not_train_says_so(server: LocalServer) -> None:
    for path in ("/v1/files", "/v1/fine_tuning/jobs", "/v1/files/file-1"):
        response = server.request(path)
        assert response.status_code == 404
        assert "--train" in response.json()["error"]["message"]
    upload = server.run(lambda client: client.post("/v1/files", content=b"", headers=FORM))
    assert upload.status_code == 404
