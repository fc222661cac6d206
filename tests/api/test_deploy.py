"""The recipes of deploy/: each is read by the program it is for, and names only what a server has."""

import configparser
import json
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from loradeck.cli import app

from .conftest import TIMEOUT, LocalServer

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
METRIC = re.compile(r"\b(?:vllm:|loradeck_)[a-z0-9_]+")


def panels() -> list[dict[str, Any]]:
    return json.loads((DEPLOY / "grafana-dashboard.json").read_text(encoding="utf-8"))["panels"]


def queries() -> list[str]:
    return [target["expr"] for panel in panels() for target in panel["targets"]]


def ask(client: httpx.Client) -> None:
    """Let a server answer one request through an adapter, so that every metric has a series."""
    body = {"model": "poet", "prompt": "red blue red blue red blue", "max_tokens": 8, "ignore_eos": True}
    assert client.post("/v1/completions", json=body).status_code == 200


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_dashboard_asks_only_for_metrics_of_a_server(training_server: LocalServer) -> None:
    with training_server.listening() as (url, _), httpx.Client(base_url=url, timeout=TIMEOUT) as client:
        ask(client)
        families = [*text_string_to_metric_families(client.get("/metrics").text)]
    names = {sample.name for family in families for sample in family.samples} | {family.name for family in families}
    for query in queries():
        assert METRIC.findall(query), query
        assert {*METRIC.findall(query)} <= names, query


def test_the_panels_of_the_dashboard_do_not_overlap() -> None:
    cells = [
        (panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y)
        for panel in panels()
        for x in range(panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["h"])
    ]
    assert len(cells) == len({*cells})
    assert max(x for x, _ in cells) < 24  # Grafana's columns
    assert len({panel["id"] for panel in panels()}) == len(panels())


@pytest.fixture
def prometheus(training_server: LocalServer, tmp_path: Path) -> Iterator[httpx.Client]:
    """A real Prometheus with our configuration, which reads a server that has answered a request."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is not installed: apt-get install prometheus")
    with training_server.listening() as (url, _), httpx.Client(base_url=url, timeout=TIMEOUT) as client:
        ask(client)
        host = url.removeprefix("http://")
        config = (DEPLOY / "prometheus.yml").read_text(encoding="utf-8")
        assert config.count("localhost:8000") == 1
        (tmp_path / "prometheus.yml").write_text(config.replace("localhost:8000", host), encoding="utf-8")
        command = [program, f"--config.file={tmp_path / 'prometheus.yml'}", f"--storage.tsdb.path={tmp_path / 'data'}"]
        with (tmp_path / "log").open("wb") as log:
            process = subprocess.Popen([*command, "--web.listen-address=127.0.0.1:0"], stdout=log, stderr=log)
        try:
            until(lambda: process.poll() is not None or address(tmp_path / "log") is not None)
            place = address(tmp_path / "log")
            assert place is not None, (tmp_path / "log").read_text()
            with httpx.Client(base_url=f"http://{place}", timeout=TIMEOUT) as reader:
                yield reader
        finally:
            process.terminate()
            process.wait(TIMEOUT)


def address(log: Path) -> str | None:
    """Return where a Prometheus listens, once its log says so."""
    match = re.search(r'"?Listening on"? address=(\S+)', log.read_text(encoding="utf-8"))
    return match[1] if match else None


@pytest.mark.slow
def test_prometheus_answers_every_query_of_the_dashboard(prometheus: httpx.Client) -> None:
    def answer(query: str) -> list[Any]:
        query = query.replace("$instance", ".*").replace("$__rate_interval", "10m")
        response = prometheus.get("/api/v1/query", params={"query": query})
        assert response.status_code == 200, f"{query}: {response.text}"
        return response.json()["data"]["result"]

    rates = 'rate(vllm:generation_tokens_total{instance=~"$instance"}[$__rate_interval])'
    until(lambda: bool(answer(rates)))  # there is a rate once the server was read twice
    for query in queries():
        result = answer(query)
        assert result or "loradeck_job" in query, query  # no job runs


def test_the_service_starts_a_server_by_flags_that_there_are() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]  (systemd's keys have capitals)
    unit.read_string((DEPLOY / "loradeck.service").read_text(encoding="utf-8"))
    program, *arguments = shlex.split(unit["Service"]["ExecStart"])
    assert Path(program).name == "loradeck"
    command, bound, _ = app.parse_args(arguments, exit_on_error=False, print_error=False)
    assert command.__name__ == "serve"
    assert bound.arguments["adapters"] == f"/var/lib/{unit['Service']['StateDirectory'].split()[-1]}"


def test_systemd_reads_the_service(tmp_path: Path) -> None:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not installed")
    text = (DEPLOY / "loradeck.service").read_text(encoding="utf-8")
    text = text.replace("/opt/loradeck/bin/loradeck", shutil.which("true") or "/bin/true")

    def complaints(name: str, text: str) -> list[str]:
        (tmp_path / name).write_text(text, encoding="utf-8")
        process = subprocess.run([program, "verify", tmp_path / name], capture_output=True, text=True)
        return [line for line in process.stderr.splitlines() if name in line]

    if not complaints("wrong.service", text.replace("DynamicUser=", "DynamicUsers=")):
        pytest.skip("systemd-analyze verifies nothing here")
    assert complaints("loradeck.service", text) == []
