"""The client: chats with our server, and with servers that answer in odd ways."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from loradeck import AdapterStore, Base
from loradeck.api.app import app
from loradeck.api.auth import ApiKey, ApiKeys
from loradeck.api.metrics import Metrics
from loradeck.api.server import Server, listen, url_of
from loradeck.cli.openai_client import OpenAIClient
from loradeck.errors import ConfigError, RequestError
from loradeck.serve.engine import Engine

SAY = [{"role": "user", "content": "hi"}]
SECRET = "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b"  # sha256 of "secret"


@pytest.fixture
def url(tiny_folder: Path, adapters: Path) -> Iterator[str]:
    """A server with poet and pirate, and the key `secret`."""
    metrics = Metrics("tiny")
    with Engine(Base.load(tiny_folder), AdapterStore(adapters), observer=metrics) as engine:
        address = listen("127.0.0.1", 0, has_keys=True)
        server = Server(app(engine, metrics, keys=ApiKeys([ApiKey("a", SECRET, control=True)])), address)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield url_of(address)
        server.should_exit = True
        thread.join()


@contextmanager
def fake_server(*bodies: bytes, status: int = 200) -> Iterator[tuple[str, list[Any]]]:
    """A server that answers with these bodies in order; yields its URL and its requests."""
    requests: list[Any] = []
    remaining = [*bodies]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            length = int(self.headers.get("content-length", 0))
            requests.append((self.path, json.loads(self.rfile.read(length) or b"null"), self.headers["authorization"]))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(remaining.pop(0))

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", requests
        server.shutdown()
        thread.join()


def stream_of(*pieces: str | None, end: bytes = b"data: [DONE]\n\n") -> bytes:
    events = [{"choices": [{"index": 0, "delta": {"content": piece}}]} for piece in pieces]
    return b"".join(f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode() for event in events) + end


def test_a_conversation_with_our_server(run: Callable, url: str) -> None:
    typed = "Hi\n/adapter pirate\nAnd now?\n/blend poet=0.7 pirate=0.3\nAnd now?\n/base\n/help\n/adapter piratte\nHi\n/base\nHi\n"
    flags = ["--server", f"{url}/v1/", "--key", "secret", "-a", "poet*0.5", "--max-new-tokens", 4, "--seed", 1]
    ran = run("chat", *flags, typed=typed)
    assert ran.code == 0, ran.err
    assert f"tiny on {url}/v1/ with pirate, poet; /help lists the commands" in ran.out
    assert ran.out.count("poet=0.5 > ") == 2
    for speaker in ("pirate", "poet=0.7 pirate=0.3", "base"):
        assert f"{speaker}, from the next turn on\n{speaker} > " in ran.out
    assert "is named 'piratte'\nDid you mean pirate?\npiratte > " in ran.out
    assert ran.out.endswith("base > \n")


def test_many_adapters_are_counted(run: Callable) -> None:
    models = json.dumps({"data": [{"id": name} for name in ("base", *(f"a{i}" for i in range(1234)))]}).encode()
    with fake_server(models) as (url, _):
        ran = run("chat", "--server", url, typed="/help\n")
    listed = "1,234 adapters: a0, a1, a2, a3, a4, a5, a6, a7 and 1,226 more"
    assert f"base on {url} with {listed}; /help lists the commands\n" in ran.out
    assert f"/quit                 leave; so does the end of input\n{listed}\n" in ran.out


def test_a_system_prompt_stays_before_the_conversation(run: Callable) -> None:
    bodies = [b'{"data": [{"id": "base"}]}', *[stream_of("a")] * 3]
    with fake_server(*bodies) as (url, requests):
        assert run("chat", "--server", url, "--system", "Be short.", typed="Hi\nMore\n/reset\nAgain\n").code == 0
    conversations = [[turn["content"] for turn in body["messages"]] for _, body, _ in requests[1:]]
    assert conversations == [["Be short.", "Hi"], ["Be short.", "Hi", "a", "More"], ["Be short.", "Again"]]


def test_answers_break_at_words(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = ["Arrr, the sa", "lt in the", " sea be from the wind", ", matey"]
    with fake_server(b'{"data": [{"id": "base"}]}', stream_of(*pieces)) as (url, _):
        monkeypatch.setenv("COLUMNS", "20")
        ran = run("chat", "--server", url, typed="Hi\n")
    assert "Arrr, the salt in\nthe sea be from the\nwind, matey\n" in ran.out


def test_a_server_gets_the_weights_of_a_blend_in_full(run: Callable) -> None:
    with fake_server(b'{"data": [{"id": "base"}]}', stream_of("a")) as (url, requests):
        run("chat", "--server", url, "-a", "poet*0.123456789+poet*0.25+pirate", typed="Hi\n")
    assert requests[1][1]["model"] == "poet*0.373456789+pirate"


def test_the_server_says_what_generate_does(run: Callable, url: str, tiny_folder: Path, adapters: Path) -> None:
    greedy = ["--max-new-tokens", 6, "--temperature", 0]
    far = run("chat", "--server", url, "--key", "secret", *greedy, typed="/adapter poet\nHi\n").out
    near = run("generate", tiny_folder, "Hi", "-a", adapters / "poet", *greedy).out
    assert f"poet > {near}" in far


def test_the_key_may_come_from_the_environment(run: Callable, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = run("chat", "--server", url)
    assert ran.code == 2
    assert "This server requires an API key." in ran.err
    monkeypatch.setenv("LORADECK_KEY", "secret")
    assert run("chat", "--server", url).code == 0


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["chat"], "either a base or a server"),
        (["chat", "base", "--server", "http://127.0.0.1:1"], "either a base or a server"),
        (["chat", "--server", "http://127.0.0.1:1"], "cannot reach"),
        (["chat", "--server", "http://127.0.0.1:1", "--temperature", "0", "--top-p", "0.5"], "--top-p needs a temp"),
        (["chat", "--server", "file:///etc/passwd"], "invalid server URL"),
        (["chat", "--server", "http://127.0.0.1:1", "-a", "poet*much"], "invalid blend"),
    ],
)
def test_invalid_arguments_are_refused(run: Callable, command: list[str], message: str) -> None:
    ran = run(*command)
    assert ran.code == 2
    assert message in ran.err


def test_requests_and_responses() -> None:
    with fake_server(b'{"data": [{"id": "gpt", "owned_by": "x"}]}', stream_of(None, "a\u2028", "b")) as (url, requests):
        client = OpenAIClient(url, "k")
        assert client.models() == ["gpt"]
        assert "".join(client.stream("gpt", SAY, temperature=0.5, seed=None)) == "a\u2028b"
    body = {"model": "gpt", "messages": SAY, "stream": True, "temperature": 0.5}
    assert requests == [("/v1/models", None, "Bearer k"), ("/v1/chat/completions", body, "Bearer k")]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (stream_of("a", end=b""), "broke off"),
        (stream_of("a", end=b'data: {"error": {"message": "no room"}}\n\n'), "no room"),
        (stream_of("a", end=b'data: {"error": "no room"}\n\n'), "no room"),
        (b"data: what\n\n", "is not OpenAI-compatible"),
        (b'data: {"choices": [{"delta": 3}]}\n\n', "is not OpenAI-compatible"),
    ],
)
def test_a_broken_stream_is_an_error(body: bytes, message: str) -> None:
    with fake_server(body) as (url, _), pytest.raises(RequestError, match=message):
        list(OpenAIClient(url).stream("", SAY))


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b'{"error": {"message": "no such page"}}', 404, "no such page"),
        (b'{"detail": "Not Found"}', 404, "404"),
        (b"<html>", 502, "502"),
        (b"<html>", 200, "is not OpenAI-compatible"),
        (b'{"data": []}', 200, "lists no models"),
    ],
)
def test_a_server_that_is_not_compatible_is_an_error(body: bytes, status: int, message: str) -> None:
    with fake_server(body, status=status) as (url, _), pytest.raises(RequestError, match=message):
        OpenAIClient(url).models()


def test_closing_the_stream_aborts_the_request(url: str) -> None:
    pieces = OpenAIClient(url, "secret").stream("poet", SAY, max_tokens=200, n=64, ignore_eos=True)
    next(pieces)
    pieces.close()
    until = time.monotonic() + 300
    while 'finished_reason="abort"' not in httpx.get(f"{url}/metrics", headers={"authorization": "Bearer secret"}).text:
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_url_is_checked() -> None:
    with pytest.raises(ConfigError, match="http://"):
        OpenAIClient("localhost:8000")
