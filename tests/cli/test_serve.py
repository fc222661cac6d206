"""`loradeck serve` as a process: its first lines, its curl command, and SIGTERM."""

import copy
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.classifiers import make, wrapped
from transformers import PreTrainedTokenizerFast

from loradeck import Base
from loradeck.cli.serve import usable
from loradeck.serve.engine import Engine
from loradeck.store import AdapterStore

pytestmark = pytest.mark.slow


@contextmanager
def serving(*arguments: object) -> Iterator[tuple[subprocess.Popen, list[str]]]:
    """The process once it is ready, and the lines it printed."""
    command = [sys.executable, "-W", "error", "-m", "loradeck", "serve", *map(str, arguments), "--port", "0"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            yield process, [process.stdout.readline().strip() for _ in range(2)]
        finally:
            process.kill()


def request(curl: str, **fields: Any) -> dict[str, Any]:
    """The arguments of httpx.request for a curl command."""
    _, url, *rest = shlex.split(curl)
    options = dict(zip(rest[::2], rest[1::2], strict=True))
    assert options.keys() == {"-H", "-d"}
    name, _, value = options["-H"].partition(": ")
    return {"method": "POST", "url": url, "headers": {name: value}, "content": options["-d"], **fields}


def listens(url: str) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", int(url.rpartition(":")[2]))) == 0


def test_a_server_from_its_start_to_its_end(tiny_folder: Path, adapters: Path) -> None:
    with serving(tiny_folder, "--adapters", adapters, "--drain", 600) as (process, (ready, curl)):
        assert re.fullmatch(r"tiny with 3 adapters on http://127\.0\.0\.1:\d+, after [\d.]+ s; try:", ready), process
        answer = httpx.request(**request(curl), timeout=300)
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == "pirate"  # the first that is whole
        url = re.search(r"http://\S+:\d+", curl)[0]
        body = {"model": "poet", "prompt": "Once", "max_tokens": 240, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=300) as stream:
            lines = stream.iter_lines()
            events = [next(lines)]
            process.send_signal(signal.SIGTERM)
            events += [line for line in lines if line]
        assert events[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in events[-2]
        assert process.wait(300) == 0
        problems = [line for line in process.stderr if " INFO " not in line]
        assert len(problems) == 1
        assert "cut cannot be served" in problems[0]


def test_a_server_imports_nothing_that_only_other_verbs_need(tiny_folder: Path, tmp_path: Path) -> None:
    """Most of a start is imports, of which each also takes memory."""
    options = ["-X", "importtime", "-m", "loradeck", "serve", tiny_folder, "--port", "0"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, *options], stdout=subprocess.PIPE, stderr=log, text=True)
        with process:
            assert process.stdout is not None
            ready = process.stdout.readline()
            process.terminate()
    assert "tiny" in ready
    modules = set(re.findall(r"\| +([\w.]+)$", (tmp_path / "log").read_text(), flags=re.MULTILINE))
    assert {"torch", "loradeck.serve.engine"} <= modules
    others = {"datasets", "matplotlib", "pandas", "peft", "pyarrow", "scipy", "tensorboard"}
    own = {"loradeck.demo", "loradeck.evaluation.evaluator", "loradeck.gguf", "loradeck.toy", "loradeck.train"}
    assert not modules & {*others, *own}


def test_a_draft_model(tiny_folder: Path, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with serving(tiny_folder, "--draft-model", tiny_folder, "--num-speculative-tokens", 4) as (_, (_, curl)):
        answer = httpx.request(**request(curl), timeout=300)
        assert answer.status_code == 200, answer.text
    other = shutil.copytree(tiny_folder, tmp_path / "other")
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(other)
    with serving(tiny_folder, "--draft-model", other) as (process, _):
        assert "the draft model other has another vocabulary than tiny" in process.stderr.read()
        assert process.wait(300) == 2


# PEFT asks for an attribute of transformers by its old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_a_base_that_classifies(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    make("bert", "classify", 2, 1).save_pretrained(tmp_path / "bert")
    tiny_tokenizer.save_pretrained(tmp_path / "bert")
    wrapped("bert", "classify", 3, 1).save_pretrained(str(tmp_path / "store" / "three"))
    options = ("--task", "classify", "--adapters", tmp_path / "store")
    with serving(tmp_path / "bert", *options, "--drain", 600) as (process, (ready, curl)):
        assert ready.startswith("bert with 1 adapter on ")
        answer = httpx.request(**request(curl), timeout=300)
        assert answer.status_code == 200, answer.text
        assert answer.json()["data"][0]["num_classes"] == 3
        process.send_signal(signal.SIGTERM)
        assert process.wait(300) == 0
    with serving(tmp_path / "bert", *options, "--draft-model", tmp_path / "bert") as (process, _):
        assert "a draft model is only for the task generate" in process.stderr.read()
        assert process.wait(300) == 2


@contextmanager
def posting(url: str, path: str, framing: str) -> Iterator[socket.socket]:
    """A connection on which the server has begun to read a request's body, which is `framing` long."""
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as client:
        headers = f"Host: localhost\r\nContent-Type: application/json\r\nExpect: 100-continue\r\n{framing}"
        client.sendall(f"POST {path} HTTP/1.1\r\n{headers}\r\n\r\n".encode())
        assert client.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        yield client


class Log:
    """Reads the log of a process while it runs."""

    def __init__(self, process: subprocess.Popen) -> None:
        self._process = process
        self.lines: list[str] = []

    def until(self, text: str) -> str:
        """Read on up to a line with this text; fails if the log ends before."""
        for line in self._process.stderr:
            self.lines.append(line)
            if text in line:
                return line
        raise AssertionError(f"no line with {text!r} among {self.lines}")

    def rest(self) -> list[str]:
        return [*self.lines, *self._process.stderr]


def test_the_log_tells_what_happened(tiny_folder: Path, adapters: Path, tmp_path: Path) -> None:
    shutil.copytree(adapters / "poet", adapters / "a+b")
    shutil.copytree(adapters / "poet", tmp_path / "other")
    (tmp_path / "keys.toml").write_text(f'[ops]\nsha256 = "{hashlib.sha256(b"secret").hexdigest()}"\ncontrol = true\n')
    flags = [
        "--adapters",
        adapters,
        "--log-format",
        "json",
        "--keys",
        tmp_path / "keys.toml",
        "--adapter-bytes",
        45_000,
        "--dtype",
        "float32",
    ]
    with serving(tiny_folder, *flags) as (process, (_, curl)):
        log, url = Log(process), re.search(r"http://\S+:\d+", curl)[0]
        log.until("a+b")
        with httpx.Client(base_url=url, timeout=300, headers={"authorization": "Bearer secret"}) as client:

            def complete(identity: str, **fields: Any) -> httpx.Response:
                body = {"prompt": "a secret prompt", "max_tokens": 3, "ignore_eos": True, **fields}
                return client.post("/v1/completions", json=body, headers={"x-request-id": identity})

            assert complete("one", model="poet", n=2).status_code == 200
            assert complete("two", model="pirate*0.5").status_code == 200
            assert complete("three", model="nobody").status_code == 404
            body = {"lora_name": "new", "lora_path": str(tmp_path / "other")}
            assert client.post("/v1/load_lora_adapter", json=body).status_code == 200
            assert client.post("/v1/unload_lora_adapter", json=body).status_code == 200
            assert client.get("/v1/models", headers={"authorization": "Bearer wrong"}).status_code == 401
        process.send_signal(signal.SIGTERM)
        assert process.wait(300) == 0
        entries = [json.loads(line) for line in log.rest()]
    assert all(entry.keys() >= {"time", "level", "logger", "message"} for entry in entries)
    assert not [entry for entry in entries if "secret" in str(entry)]
    requests = {entry["id"]: entry for entry in entries if "id" in entry}
    one, two, three = (requests[identity] for identity in ("one", "two", "three"))
    assert one.items() >= {
        "method": "POST", "path": "/v1/completions", "status": 200, "key": "ops", "model": "tiny", "adapter": "poet@0",
        "prompt_tokens": 15, "generated_tokens": 6, "finish": "length", "client": "127.0.0.1",
    }.items()  # fmt: skip
    assert 0 < one["first_token_seconds"] < one["seconds"]
    assert (two["adapter"], two["generated_tokens"]) == ("pirate@0*0.5", 3)
    assert (three["status"], three["error"].partition(" is named")[2]) == (404, " 'nobody'")
    assert [entry["status"] for entry in entries if entry.get("path") == "/v1/models"] == [401]
    messages = [entry["message"] for entry in entries]
    for text in ("serving tiny in float32 on http", "loaded poet@0 in", "evicted poet@0: ", "published new@1 from",
                 "unloaded new@1: ", "shutting down: 0 answers", "shut down after"):  # fmt: skip
        assert [message for message in messages if text in message], text
    problems = [(entry.get("folders"), entry.get("adapter")) for entry in entries if entry["level"] == "warning"]
    assert problems == [("a+b", None), (None, "cut")]


@pytest.mark.parametrize("complete", [True, False])
def test_a_client_that_goes_away_is_one_quiet_line(tiny_folder: Path, complete: bool) -> None:
    body = b'{"prompt": "Once", "max_tokens": 240, "ignore_eos": true, "n": 128}'
    with serving(tiny_folder) as (process, (_, curl)):
        log, url = Log(process), re.search(r"http://\S+:\d+", curl)[0]
        with posting(url, "/v1/completions", f"Content-Length: {len(body)}") as client:
            client.sendall(body if complete else body[:10])
        assert " INFO POST /v1/completions " in log.until("status=499")
        process.send_signal(signal.SIGTERM)
        assert process.wait(300) == 0
        assert [line for line in log.rest() if " INFO " not in line] == []


def test_a_shutdown_waits_for_no_unfinished_request(tiny_folder: Path) -> None:
    """It waits for answers in progress only: clients may have sent nothing, half a request, or half a body."""
    with serving(tiny_folder, "--drain", 600) as (process, (_, curl)):
        log, url = Log(process), re.search(r"http://\S+:\d+", curl)[0]
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        with (
            socket.create_connection(address),
            socket.create_connection(address) as half,
            posting(url, "/v1/completions", "Content-Length: 1000") as unfinished,
            posting(url, "/v1/load_lora_adapter", "Transfer-Encoding: chunked") as chunked,
        ):
            half.sendall(b"POST /v1/comp")
            unfinished.sendall(b'{"prompt": "On')
            chunked.sendall(b"5\r\n{")
            process.send_signal(signal.SIGTERM)
            assert b"503 Service Unavailable" in unfinished.recv(1000)
            assert b"503 Service Unavailable" in chunked.recv(1000)
            assert process.wait(300) == 0
        assert not [line for line in log.rest() if "Traceback" in line or " ERROR " in line]


def test_a_shutdown_waits_seconds_for_a_client_that_does_not_read(tiny_folder: Path) -> None:
    body = b'{"prompt": "Once", "max_tokens": 240, "ignore_eos": true, "n": 128, "stream": true, "logprobs": 5}'
    with serving(tiny_folder, "--drain", 600) as (process, (_, curl)):
        url = re.search(r"http://\S+:\d+", curl)[0]
        with posting(url, "/v1/completions", f"Content-Length: {len(body)}") as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.sendall(body)
            assert b"200 OK" in client.recv(100)
            process.send_signal(signal.SIGTERM)
            assert process.wait(300) == 0
        assert "Traceback" not in process.stderr.read()


def test_a_second_signal_ends_it_at_once(tiny_folder: Path) -> None:
    with serving(tiny_folder, "--drain", 600) as (process, (_, curl)):
        url = re.search(r"http://\S+:\d+", curl)[0]
        body = {"prompt": "Once", "max_tokens": 240, "ignore_eos": True, "stream": True, "n": 128}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=300) as stream:
            next(stream.iter_lines())
            process.send_signal(signal.SIGTERM)
            while listens(url):
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            assert process.wait(300) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--host", "0.0.0.0"], "without API keys"),
        (["--port", "99999"], "cannot listen on"),
        (["--keys", "nowhere.toml"], "cannot read nowhere.toml"),
        (["--adapters", "nowhere"], "cannot be read"),
        (["--max-rows", "0"], "max_rows"),
        (["--drain", "0"], "drain=0"),
        (["--max-step-tokens", "2"], "max_rows=16"),
    ],
)
def test_errors_are_reported_before_the_base_is_loaded(run: Callable, flags: list[str], message: str) -> None:
    ran = run("serve", "no-such-base", *flags)
    assert ran.code == 2
    assert message in ran.err
    assert "no-such-base" not in ran.err


def test_an_adapters_own_folder_is_no_store(run: Callable, adapters: Path) -> None:
    ran = run("serve", "no-such-base", "--adapters", adapters / "poet")
    assert ran.code == 2
    assert "poet is an adapter, not a folder of adapters" in ran.err


def test_a_base_that_cannot_be_loaded_is_one_line(run: Callable) -> None:
    ran = run("serve", "./nowhere", "--port", 0)
    assert ran.code == 2
    assert "nowhere" in ran.err


def test_the_example_fits_the_server(
    tiny_folder: Path, adapters: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    from loradeck.cli.serve import curl

    base = Base.load(tiny_folder)
    with Engine(base, AdapterStore(adapters)) as engine:
        assert usable(engine) == "pirate"
        message = curl("http://localhost:1", engine, has_keys=True)
        assert '-H "authorization: Bearer $KEY"' in message
        assert "/v1/chat/completions" in message
        assert engine.adapter_cache.residents() == []
    base.tokenizer.chat_template = None
    with Engine(base) as engine:
        message = curl("http://localhost:1", engine, has_keys=False)
        assert "/v1/completions" in message
        assert '"model":"tiny"' in message
        assert "authorization" not in message
