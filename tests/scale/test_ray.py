"""Replicas on Ray: a real cluster of two, started by `loradeck serve --ray`, on a tiny base.

LORADECK_RAY names a Python that has Ray Serve and what loradeck needs; see docs/scale.md.
"""

import hashlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from tests.tiny_models import SHAPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from loradeck import AdapterStore, Bank, Base, LoraConfig
from loradeck.sampling import SamplingParams
from loradeck.scale.rendezvous import home_of
from loradeck.serve.engine import Engine

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("LORADECK_RAY") or (sys.executable if find_spec("ray") else "")
LIMIT = 300  # seconds, for a machine that has other work
ADAPTERS, ROOM = 200, 20  # in the store, and at a replica
REQUESTS, EXPONENT = 600, 1.5
KEY = {"authorization": "Bearer secret"}
ENVIRONMENT = {
    **os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0",
}  # fmt: skip
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="needs Ray, here or in the environment of LORADECK_RAY=…/bin/python"),
]


@dataclass
class Cluster:
    base: Path
    store: Path
    keys: Path
    port: int
    adapter_bytes: int
    process: subprocess.Popen[str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, **settings: object) -> httpx.Client:
        return httpx.Client(**{"base_url": self.url, "headers": KEY, "timeout": LIMIT, **settings})

    def complete(self, model: str, tokens: int = 1, **fields: object) -> httpx.Response:
        body = {"model": model, "prompt": "hello", "max_tokens": tokens, "temperature": 0, **fields}
        with self.client() as client:
            return client.post("/v1/completions", json=body)

    def samples(self, name: str) -> dict[str, float]:
        """The values of a metric, by replica."""
        with self.client() as client:
            text = client.get("/metrics").text
        values: Counter[str] = Counter()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == name:
                    values[sample.labels["replica"]] += sample.value
        return values

    @property
    def replicas(self) -> list[str]:
        return sorted(self.samples("loradeck_adapter_loads_total"))

    def deploy(self, **scale: int) -> None:
        """Serve again from another process, with rows for one request: Ray exchanges the replicas one by one."""
        code = (
            "import ray, sys, json; from ray import serve; from loradeck.scale.app import build, NAME; "
            "ray.init('auto', log_to_driver=False); serve.run(build(json.loads(sys.argv[1])), name=NAME, route_prefix='/')"
        )
        settings = {
            "base": str(self.base), "adapters": str(self.store), "keys": str(self.keys), "dtype": "float32",
            "engine": {"adapter_bytes": self.adapter_bytes, "max_rows": 1},
            "scale": {"replica_cpus": 0.5, **scale},
        }  # fmt: skip
        subprocess.run([PYTHON, "-c", code, json.dumps(settings)], env=ENVIRONMENT, check=True, timeout=LIMIT)


def until(happens: Callable[[], object], message: str) -> None:
    deadline = time.monotonic() + LIMIT
    while not happens():
        assert time.monotonic() < deadline, message
        time.sleep(0.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny base with a long context, and a store of adapters."""
    folder = tmp_path_factory.mktemp("ray")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "max_position_embeddings": 8192})).eval()
    model.save_pretrained(folder / "tiny")
    tiny_tokenizer.save_pretrained(folder / "tiny")
    bank = Bank(model)
    for number in range(ADAPTERS):
        adapter = bank.add("new", LoraConfig(r=2))
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.normal_(0, 0.2, generator=generator)
        bank.save("new", folder / "store" / f"a{number}")
        bank.unload("new")
    return folder


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[Cluster]:
    keys = folder / "keys.toml"
    keys.write_text(f'[ops]\nsha256 = "{hashlib.sha256(b"secret").hexdigest()}"\ncontrol = true\n')
    with Engine(Base.load(folder / "tiny", dtype="float32"), AdapterStore(folder / "store")) as engine:
        engine.generate([[5]], "a0", SamplingParams(max_tokens=1))
        nbytes = engine.adapter_cache.nbytes
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        PYTHON, "-m", "loradeck", "serve", folder / "tiny", "--adapters", folder / "store", "--keys", keys, "--port", port,
        "--dtype", "float32", "--adapter-bytes", ROOM * nbytes, "--ray", "--replicas", 2, "--replica-cpus", 0.5,
    ]  # fmt: skip
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([*map(str, command)], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=log, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert "by 2 replicas" in line, (folder / "log").read_text()
    yield Cluster(folder / "tiny", folder / "store", keys, port, ROOM * nbytes, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(LIMIT) == 0
    process.stdout.close()


def test_answers_are_those_of_one_engine(cluster: Cluster) -> None:
    sampling, prompt = SamplingParams(max_tokens=12, temperature=0), [5, 60, 70]
    names = [None, *(f"a{number}" for number in range(6))]
    with Engine(Base.load(cluster.base, dtype="float32"), AdapterStore(cluster.store)) as engine:
        answers = engine.generate([prompt] * len(names), names, sampling)
    for name, answer in zip(names, answers, strict=True):
        response = cluster.complete(name or "tiny", 12, prompt=prompt, return_token_ids=True)
        assert response.json()["choices"][0]["token_ids"] == [token.id for token in answer]


def test_an_adapter_stays_at_its_home_and_is_loaded_no_more_often_than_there(cluster: Cluster) -> None:
    """Requests one after the other load what an LRU cache of each replica's own adapters would."""
    homes = cluster.replicas
    generator = random.Random(0)
    weights = [1 / (rank + 1) ** EXPONENT for rank in range(ADAPTERS)]
    requests = [f"a{number}" for number in generator.choices(range(ADAPTERS), weights, k=REQUESTS)]
    caches: dict[str, OrderedDict[str, None]] = {home: OrderedDict() for home in homes}
    misses: Counter[str] = Counter(dict.fromkeys(homes, 0))

    def ask(name: str) -> None:
        assert cluster.complete(name).status_code == 200
        home = home_of(name, homes)
        cache = caches[home]
        misses[home] += name not in cache
        cache[name] = None
        cache.move_to_end(name)
        while len(cache) > ROOM:
            cache.popitem(last=False)

    for number in range(ADAPTERS // 2, ADAPTERS):  # evicts what came before
        ask(f"a{number}")
    assert all(len(cache) == ROOM for cache in caches.values())
    before = cluster.samples("loradeck_adapter_loads_total")
    misses.subtract(misses.copy())
    for name in requests:
        ask(name)
    after = cluster.samples("loradeck_adapter_loads_total")
    assert {home: after[home] - before[home] for home in homes} == dict(misses)
    print(f"hit rate {1 - sum(misses.values()) / REQUESTS:.3f}")
    assert sum(misses.values()) < 0.2 * REQUESTS


def test_requests_of_the_base_go_to_all_replicas(cluster: Cluster) -> None:
    before = cluster.samples("vllm:request_success_total")
    with ThreadPoolExecutor(8) as pool:
        assert {each.status_code for each in pool.map(lambda _: cluster.complete("tiny", 50), range(24))} == {200}
    after = cluster.samples("vllm:request_success_total")
    assert all(after[home] > before.get(home, 0) for home in cluster.replicas)


def test_a_stream_comes_as_it_is_made(cluster: Cluster) -> None:
    body = {"model": "a1", "prompt": "hello", "max_tokens": 40, "stream": True, "ignore_eos": True}
    with cluster.client() as client, client.stream("POST", "/v1/completions", json=body) as response:
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert len(lines) > 10


def test_errors_and_keys_are_a_servers(cluster: Cluster) -> None:
    assert cluster.complete("nobody").json()["error"]["type"] == "NotFoundError"
    with cluster.client(headers={}) as client:
        assert client.get("/health").status_code == 200
        assert client.get("/v1/models").status_code == 401
        assert client.get("/metrics").status_code == 401
    with cluster.client() as client:
        json_type = {"content-type": "application/json"}
        assert client.post("/v1/completions", content=b"{", headers=json_type).status_code == 400
        assert client.post("/v1/completions", content=b" " * (9 << 20)).status_code == 413
        assert client.get("/v1/nothing").status_code == 404


def test_a_published_version_is_seen_by_all(cluster: Cluster) -> None:
    store = AdapterStore(cluster.store)
    store.publish("a7", cluster.store / "a8")
    old, new = (cluster.complete(name, 12, return_token_ids=True).json() for name in ("a8", "a7"))
    assert new["choices"][0]["token_ids"] == old["choices"][0]["token_ids"]


def test_a_client_that_goes_away_frees_its_row(cluster: Cluster) -> None:
    body = {"model": "a2", "prompt": "hello", "max_tokens": 8000, "stream": True, "ignore_eos": True}
    with cluster.client() as client, client.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        assert sum(cluster.samples("vllm:num_requests_running").values()) == 1
    until(lambda: not sum(cluster.samples("vllm:num_requests_running").values()), "the request goes on")


class Stream(threading.Thread):
    """A long answer, read in a thread of its own."""

    def __init__(self, cluster: Cluster, model: str) -> None:
        super().__init__()
        self.cluster, self.model, self.lines = cluster, model, list[str]()
        self.start()

    def run(self) -> None:
        body = {"model": self.model, "prompt": "hello", "max_tokens": 3000, "stream": True, "ignore_eos": True}
        with self.cluster.client() as client, client.stream("POST", "/v1/completions", json=body) as response:
            self.lines += (line for line in response.iter_lines() if line)


def pids(cluster: Cluster) -> list[int]:
    processes = psutil.Process(cluster.process.pid).children(recursive=True)
    return [
        each.pid for each in processes if re.search(r"ServeReplica:loradeck:Replica", each.name() + str(each.cmdline()))
    ]


def test_a_killed_replica_ends_its_streams_with_an_error_and_comes_back(cluster: Cluster) -> None:
    homes = cluster.replicas
    names = [next(f"a{n}" for n in range(ADAPTERS) if home_of(f"a{n}", homes) == home) for home in homes]
    streams = [Stream(cluster, name) for name in names]
    until(lambda: all(stream.lines for stream in streams), "no stream begins")
    os.kill(pids(cluster)[0], signal.SIGKILL)
    for stream in streams:
        stream.join(LIMIT)
    ends = sorted(stream.lines[-1] for stream in streams)
    assert ends[0] == "data: [DONE]"
    error = json.loads(ends[1].removeprefix("data: "))["error"]
    assert error["code"] == 503
    assert "Send the request again." in error["message"]
    for name in names:
        until(lambda name=name: cluster.complete(name).status_code == 200, "no replica answers")
    until(lambda: len(cluster.replicas) == 2, "the replica does not come back")


def test_replicas_are_added_and_exchanged_and_no_request_is_lost(cluster: Cluster) -> None:
    statuses: list[int] = []
    is_over = threading.Event()

    def ask(number: int) -> None:
        while not is_over.is_set():
            statuses.append(cluster.complete(f"a{number}", 20).status_code)

    with ThreadPoolExecutor(4) as pool:
        try:
            asking = [pool.submit(ask, number) for number in range(4)]
            before = set(cluster.replicas)
            cluster.deploy(replicas=1, max_replicas=2)
            until(lambda: not before & set(cluster.replicas), "the replicas are not exchanged")
            first = set(cluster.replicas)
            until(lambda: len(now := set(cluster.replicas)) == 2 and first <= now, "no replica is added")
            cluster.deploy(replicas=2)
            until(lambda: not first & set(cluster.replicas), "the replicas are not exchanged again")
        finally:
            is_over.set()
        for each in asking:
            each.result(LIMIT)
    assert set(statuses) == {200}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ray-address", "127.0.0.1:1"], "no Ray cluster at 127.0.0.1:1"),
        (["--replicas", "0"], "replicas must be at least 1, not 0"),
        (["--train"], "replicas do not train"),
    ],
)
def test_what_cannot_be_is_one_error(folder: Path, flags: Sequence[str], message: str) -> None:
    command = [
        PYTHON,
        "-m",
        "loradeck",
        "serve",
        folder / "tiny",
        "--adapters",
        folder / "store",
        "--ray",
        "--port",
        "0",
    ]
    process = subprocess.run(
        [*map(str, command), *flags], env=ENVIRONMENT, capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert process.returncode == 2, process.stderr
    assert message in process.stderr


def test_workers_train_what_one_process_trains(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{n}?", "completion": f"It is {n}."}) + "\n" for n in range(40)))
    losses = []
    for name, flags in (("one", []), ("two", ["--ray", "--workers", "2"])):
        settings = "--dtype float32 --max-steps 4 --batch-size 4 --valid-ratio 0.2 --r 4 --lora-dropout 0.1".split()
        command = [PYTHON, "-m", "loradeck", "train", folder / "tiny", data, "-o", name, *settings, *flags]
        process = subprocess.run(
            [*map(str, command)],
            env=ENVIRONMENT,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )
        assert process.returncode == 0, process.stderr
        events = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        losses.append([event["loss"] for event in events if "loss" in event])
        assert (tmp_path / name / "adapter_model.safetensors").exists()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)


def test_what_a_run_cannot_be_is_said_before_workers_start(folder: Path, tmp_path: Path) -> None:
    command = [PYTHON, "-m", "loradeck", "train", folder / "tiny", "missing.jsonl", "-o", "run", "--ray"]
    process = subprocess.run(
        [*map(str, command)], env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert process.returncode == 2
    assert re.match(r"loradeck: .*missing.jsonl", process.stderr)
