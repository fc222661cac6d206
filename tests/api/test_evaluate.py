"""`POST /evaluate`: the report of loradeck.evaluate, computed by the engine."""

import asyncio
import hashlib
from typing import Any

import httpx
import msgspec
import pytest

from loradeck import Bank, Base, evaluate
from loradeck.api.auth import ApiKey, ApiKeys
from loradeck.api.config import ServerConfig
from loradeck.dataset.example import examples
from loradeck.dataset.record import parse
from loradeck.evaluation.config import EvalConfig
from loradeck.serve.engine import Engine
from loradeck.store import AdapterStore

from .conftest import LocalServer, StepGate, random_adapter, until

pytestmark = pytest.mark.slow

PATH = "/evaluate"
RECORDS = [
    {"prompt": "Hi", "completion": "Ahoy!"},
    {"messages": [{"role": "user", "content": "Bye"}, {"role": "assistant", "content": "Fair winds, matey"}]},
    {"text": "The sea, the sea"},
]
PAIRS = [
    {"prompt": "Hi", "chosen": "Ahoy!", "rejected": "Hello."},
    {"prompt": "Sea?", "chosen": "Aye, the sea", "rejected": "Water"},
]
NAMES = ["poet", "poet@1", "poet*0.7+pirate*-0.3"]


@pytest.mark.parametrize("records", [RECORDS, PAIRS], ids=["examples", "pairs"])
def test_the_report_is_that_of_evaluate(server: LocalServer, base: Base, store: AdapterStore, records: list) -> None:
    body = {"examples": records, "adapters": NAMES, "exact_match": True, "samples": 2, "max_new_tokens": 6}
    found = server.request(PATH, body).json()
    bank = Bank(base.model)
    for name, spec in (("latest", "poet@2"), ("first", "poet@1"), ("pirate", "pirate")):
        bank.load(store.find(spec).path, name)
    rows = dict(zip(NAMES, ["latest", "first", {"latest": 0.7, "pirate": -0.3}], strict=True))
    data = [each for record in records for each in examples(parse(msgspec.json.encode(record)), base.tokenizer, 256)]
    report = evaluate(base, bank, data, rows, EvalConfig(exact_match=True, samples=2, max_new_tokens=6))  # type: ignore[arg-type]
    expected = msgspec.to_builtins(report)
    assert (found["examples"], found["tokens"], found["answers"]) == (len(data), report.tokens, report.answers)
    assert [each["adapter"] for each in found["adapters"]] == ["tiny", *NAMES]
    for one, other in zip(found["adapters"], expected["adapters"], strict=True):
        for name in ("loss", "perplexity", "exact_match", "accuracy", "margin"):
            assert one[name] == (other[name] and pytest.approx(other[name], abs=1e-5, rel=1e-4))
    assert [[*each["answers"].values()] for each in found["samples"]] == [
        [*each["answers"].values()] for each in expected["samples"]
    ]
    assert len({each["loss"] for each in found["adapters"]}) == 4


def test_a_version_published_meanwhile_is_not_mixed_in(
    server: LocalServer, engine: Engine, store: AdapterStore
) -> None:
    body = {"examples": RECORDS * 5, "adapters": ["pirate"], "samples": 0}
    before = server.request(PATH, body).json()
    gate = StepGate(engine)

    async def test(client: httpx.AsyncClient) -> Any:
        request = asyncio.create_task(client.post(PATH, json=body))
        gate.allow(1)
        await until(lambda: engine.stats.running)
        store.publish("pirate", random_adapter(9))
        gate.open()
        return (await request).json()

    assert server.run(test) == before
    assert server.request(PATH, body).json() != before


def test_other_clients_are_answered_meanwhile(server: LocalServer, engine: Engine) -> None:
    gate = StepGate(engine)
    body = {"examples": RECORDS * 20, "adapters": NAMES, "samples": 50, "max_new_tokens": 64}

    async def test(client: httpx.AsyncClient) -> None:
        request = asyncio.create_task(client.post(PATH, json=body))
        gate.allow(3)
        await until(lambda: engine.stats.running)
        chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "model": "team-a"}
        other = asyncio.create_task(client.post("/v1/chat/completions", json=chat))
        while not other.done():
            gate.allow(1)
            await asyncio.sleep(0.001)
        assert (await other).status_code == 200
        assert not request.done()
        request.cancel()
        gate.open()
        await asyncio.wait([request])
        await until(lambda: not engine.stats.running and not engine.stats.waiting)  # it is given up

    server.run(test)


@pytest.mark.parametrize(
    ("fields", "status", "param", "message"),
    [
        ({"examples": []}, 400, "examples", "Expected `array` of length >= 1"),
        ({"examples": [RECORDS[0], {"question": "?"}]}, 400, "examples[1]", "unknown form"),
        ({"examples": [RECORDS[0], PAIRS[0]]}, 400, "examples[1]", "cannot be mixed"),
        ({"examples": RECORDS, "max_length": 3}, 400, "examples[0]", "nothing to train on"),
        ({"examples": RECORDS, "adapters": ["nobody"]}, 404, "model", "nobody"),
        ({"examples": RECORDS, "adapters": ["poet*x"]}, 400, "adapters", "invalid blend"),
        ({"examples": RECORDS, "pattern": "(a+)+$"}, 400, "pattern", "Unsupported: pattern"),
        ({"examples": RECORDS, "samples": -1}, 400, "samples", "Expected `int` >= 0"),
        ({"examples": RECORDS * 700}, 400, "examples", "the limit is 4096"),
    ],
)
def test_what_is_wrong_is_named(
    server: LocalServer, fields: dict[str, Any], status: int, param: str, message: str
) -> None:
    response = server.request(PATH, {"adapters": ["poet"], **fields})
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert (error["param"], message in error["message"]) == (param, True), error


def test_a_key_evaluates_only_its_adapters(server: LocalServer) -> None:
    key = ApiKey("alice", hashlib.sha256(b"secret").hexdigest(), ("team-*",))
    keyed = server.configured(keys=ApiKeys([key]))
    assert keyed.request(PATH, {"examples": RECORDS, "adapters": ["poet"]}, key="secret").status_code == 403
    assert keyed.request(PATH, {"examples": RECORDS, "adapters": ["team-a"]}, key="secret").status_code == 200


def test_the_limit_is_the_servers(server: LocalServer) -> None:
    small = server.configured(config=ServerConfig(max_eval_rows=8))
    assert small.request(PATH, {"examples": RECORDS, "adapters": ["poet"], "samples": 1}).status_code == 200
    assert small.request(PATH, {"examples": RECORDS, "adapters": ["poet"], "samples": 2}).status_code == 400
