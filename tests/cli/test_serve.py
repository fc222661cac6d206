"""`loradeck serve` as a process: its first lines, its curl command, and SIGTERM."""

import os
import re
import shlex
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
        assert process.stderr.read() == ""


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
