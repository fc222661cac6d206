"""What an uploaded file holds: of every form, with every kind of problem, for its owner alone, and without a trace."""

import asyncio
import gzip
import json
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from loradeck.api.auth import ApiKey, ApiKeys
from loradeck.dataset.check import check_dataset
from loradeck.live import previews
from loradeck.live.config import LiveConfig
from loradeck.live.live_training import LiveTraining
from loradeck.live.previews import Previews

from .conftest import TIMEOUT, LocalServer, until
from .test_files import sha

CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
PAIR = {"prompt": "hi", "chosen": "yes", "rejected": "no"}
KEYS = ApiKeys([ApiKey(name, sha(f"k{name}"), train=name != "carol") for name in ("alice", "bob", "carol")])


def lines(*records: Any) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def upload(server: LocalServer, content: bytes, name: str = "a.jsonl", owner: str = "") -> str:
    with server.options["training"].uploads.upload(owner, name, "fine-tune") as file:
        file.write(content)
    return file.record.id


def check(server: LocalServer, content: bytes, name: str = "a.jsonl", query: str = "") -> dict[str, Any]:
    response = server.request(f"/v1/files/{upload(server, content, name)}/check{query}")
    assert response.status_code == 200, response.text
    folder = server.options["training"].folder
    assert str(folder) not in response.text
    assert not [*(folder / "jobs").iterdir()]
    return response.json()


def test_a_conversation(training_server: LocalServer, tmp_path: Path) -> None:
    content = lines(CHAT, {**CHAT, "id": 7}, {"messages": [*CHAT["messages"], *CHAT["messages"]]})
    result = check(training_server, content)
    (tmp_path / "a.jsonl").write_bytes(content)
    report = check_dataset(tmp_path / "a.jsonl", training_server.engine.base.tokenizer, 1024).splits["train"]
    lengths = report.lengths
    assert lengths
    assert result["splits"] == {
        "train": {
            "records": 3,
            "examples": 3,
            "lengths": {"min": lengths.min, "median": lengths.median, "p95": lengths.p95, "max": lengths.max},
            "total": report.total,
            "supervised": report.supervised,
            "truncated": 0,
            "duplicates": 1,
            "duplicate_lines": [{"location": "a.jsonl:2", "of": "a.jsonl:1"}],
            "leaked": 0,
            "labels": {},
        }
    }
    assert (result["object"], result["form"], result["method"], result["unit"]) == (
        "file.check",
        "messages",
        "supervised",
        "tokens",
    )
    assert result["id"].startswith("file-")
    assert (result["problems"], result["problem_count"], result["problem_records"]) == ([], 0, 0)
    assert result["notes"] == ["passed over: id (in 1 record)"]
    assert len(result["first"]) == 3
    first = result["first"][0]
    assert [text for text, learned in first["spans"] if learned] == ["ho<|im_end|>"]
    assert "".join(text for text, _ in first["spans"]).startswith("<|im_start|>user\nhi")
    assert first["rejected"] is None


def test_preference_pairs_are_for_dpo(training_server: LocalServer) -> None:
    result = check(training_server, lines(PAIR, PAIR))
    assert (result["form"], result["method"]) == ("preference pairs", "dpo")
    assert [result["first"][0][side][-1] for side in ("spans", "rejected")] == [
        ["yes<|im_end|>", True],
        ["no<|im_end|>", True],
    ]


def test_examples_are_cut_at_max_length(training_server: LocalServer) -> None:
    content = lines({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b" * 100})
    assert check(training_server, content)["splits"]["train"]["truncated"] == 0
    result = check(training_server, content, query="?max_length=50")["splits"]["train"]
    assert (result["truncated"], result["lengths"]["max"]) == (1, 50)


def test_ten_thousand_wrong_lines_are_one_problem(training_server: LocalServer) -> None:
    result = check(training_server, lines(CHAT) + b'{"prompt": 1}\n' * 10_000 + b"{broken\n")
    assert (result["problem_count"], result["problem_records"]) == (2, 10_001)
    wrong, broken = result["problems"]
    assert (wrong["location"], wrong["records"]) == ("a.jsonl:2", 10_000)
    assert wrong["locations"] == [f"a.jsonl:{n}" for n in range(2, 22)]
    assert broken["location"] == "a.jsonl:10002"
    assert "malformed" in broken["message"]
    assert result["splits"]["train"]["records"] == 1


def test_of_many_problems_the_first_are_told(training_server: LocalServer) -> None:
    result = check(training_server, lines(*({"messages": [{"role": f"r{chr(65 + n)}x"}]} for n in range(60))))
    assert result["problem_count"] == 60
    assert len(result["problems"]) == 50


@pytest.mark.parametrize(
    ("content", "name", "says"),
    [
        (b"\n\n", "a.jsonl", "is empty"),
        (b"\xff\xfe\x00\xd8\x00" * 100, "a.jsonl", ""),
        (b"caf\xe9 \x81\n" * 10, "a.jsonl", ""),
        (b"\x00\x01\x02" * 1000, "a.jsonl", ""),
        (b"PK\x03\x04", "a.parquet", "a.parquet"),
        (b"\x1f\x8b\x08 not gzip", "a.jsonl.gz", "a.jsonl.gz"),
        (b"<html>", "page.html", ""),
        (lines({"text": "a", "label": "x"}).replace(b"text", b"txet"), "a.jsonl", "unknown form"),
    ],
)
def test_a_file_that_is_no_dataset_has_problems(
    training_server: LocalServer, content: bytes, name: str, says: str
) -> None:
    result = check(training_server, content, name)
    assert result["problem_count"] >= 1
    assert says in result["problems"][0]["message"]
    assert (result["form"], result["first"], result["splits"]["train"]["lengths"]) == ("none", [], None)


def test_a_file_that_unpacks_to_too_much_has_a_problem(training_server: LocalServer) -> None:
    training: LiveTraining = training_server.options["training"]
    training.previews._config = LiveConfig(max_file_bytes=10_000)
    result = check(training_server, gzip.compress(lines(CHAT) * 10_000), "a.jsonl.gz")
    assert "more than 10,000 bytes once it is decompressed" in result["problems"][0]["message"]
    assert result["splits"]["train"]["records"] < 10_000


def test_only_the_first_records_of_a_large_file_are_compared(
    training_server: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(previews, "COMPARED", 4)
    result = check(training_server, lines(CHAT) * 10)
    assert (result["splits"]["train"]["records"], result["splits"]["train"]["duplicates"]) == (10, 3)
    assert result["notes"] == ["duplicates are counted among the first 4 of 10 records"]


def test_long_texts_and_many_keys_are_cut(training_server: LocalServer) -> None:
    record = {"prompt": "a" * 10_000, "completion": "b", **{f"key{n}": 1 for n in range(100)}}
    result = check(training_server, lines(record), query="?max_length=100000")
    text, _ = result["first"][0]["spans"][0]
    assert len(text) == 4001
    assert text.endswith("…")
    assert result["notes"][0].endswith("key19 (in 1 record), and 80 more")


@pytest.mark.parametrize("query", ["max_length=1", "max_length=x", "max_length=99999999999"])
def test_a_bad_parameter_is_named(training_server: LocalServer, query: str) -> None:
    response = training_server.request(f"/v1/files/{upload(training_server, lines(CHAT))}/check?{query}")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "max_length"


def test_a_key_checks_its_own_files(training_server: LocalServer) -> None:
    id = upload(training_server, lines(CHAT), owner="alice")
    server = training_server.configured(**training_server.options, keys=KEYS)
    assert server.request(f"/v1/files/{id}/check", key="kalice").status_code == 200
    for key, path, status, says in (
        ("kbob", id, 404, "there is no file"),
        ("kalice", "file-none", 404, "there is no file"),
        ("kcarol", id, 403, "may not train"),
        ("", id, 401, ""),
    ):
        response = server.request(f"/v1/files/{path}/check", key=key)
        assert response.status_code == status, response.text
        assert says in response.json()["error"]["message"]


def test_content_that_is_gone(training_server: LocalServer) -> None:
    id = upload(training_server, lines(CHAT))
    training_server.options["training"].uploads.path(id).unlink()
    response = training_server.request(f"/v1/files/{id}/check")
    assert response.status_code == 404
    assert "is gone" in response.json()["error"]["message"]


class Reading:
    """Holds the reading of files back after the first record, until a test lets it go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.released = threading.Event(), threading.Event()
        self.owners: list[str] = []
        self.ends: list[BaseException | None] = []
        read = Previews._check

        def hold(previews: Previews, id: str, owner: str, max_length: int, on_read: Any) -> Any:
            self.owners.append(owner)

            def pause(position: Any) -> None:
                self.begun.set()
                assert self.released.wait(TIMEOUT)
                on_read(position)

            try:
                result = read(previews, id, owner, max_length, pause)
            except BaseException as error:
                self.ends.append(error)
                raise
            self.ends.append(None)
            return result

        monkeypatch.setattr(Previews, "_check", hold)


def test_a_client_that_leaves_ends_the_reading(training_server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    reading = Reading(monkeypatch)
    id = upload(training_server, lines(CHAT) * 1000)

    async def main(url: str) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT) as client:
            request = asyncio.create_task(client.get(f"/v1/files/{id}/check"))
            await until(reading.begun.is_set)
            # the event loop is free meanwhile, and so are requests
            chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
            assert (await client.post("/v1/chat/completions", json=chat)).status_code == 200
            request.cancel()
            await until(lambda: state.unanswered == 0)
        reading.released.set()
        await until(lambda: reading.ends)

    with training_server.listening() as (url, state):
        asyncio.run(main(url))
    assert [type(end).__name__ for end in reading.ends] == ["Interruption"]
    assert not [*(training_server.options["training"].folder / "jobs").iterdir()]


def test_a_key_has_one_file_read_at_a_time(training_server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """There are two readers, and a key's second file waits for its first, so another key's is read at once."""
    reading = Reading(monkeypatch)
    ids = {owner: upload(training_server, lines(CHAT), owner=owner) for owner in ("alice", "bob")}
    server = training_server.configured(**training_server.options, keys=KEYS)

    async def main(url: str) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT) as client:

            def ask(owner: str) -> asyncio.Task[httpx.Response]:
                headers = {"authorization": f"Bearer k{owner}"}
                return asyncio.create_task(client.get(f"/v1/files/{ids[owner]}/check", headers=headers))

            tasks = [ask("alice"), ask("alice")]
            await until(lambda: state.unanswered == 2 and reading.owners)
            tasks.append(ask("bob"))
            await until(lambda: "bob" in reading.owners)
            assert reading.owners == ["alice", "bob"]
            reading.released.set()
            assert [(await task).status_code for task in tasks] == [200] * 3

    with server.listening() as (url, state):
        asyncio.run(main(url))
    assert reading.owners == ["alice", "bob", "alice"]


def test_a_shutdown_ends_the_reading(training_server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    reading = Reading(monkeypatch)
    training: LiveTraining = training_server.options["training"]
    id = upload(training_server, lines(CHAT) * 1000)

    async def test(client: httpx.AsyncClient) -> httpx.Response:
        request = asyncio.create_task(client.get(f"/v1/files/{id}/check"))
        await until(reading.begun.is_set)
        closing = asyncio.create_task(asyncio.to_thread(training.close))
        await until(lambda: training.previews._closed)
        reading.released.set()
        await closing
        return await request

    response = training_server.run(test)
    assert response.status_code == 429
    assert "shutting down" in response.json()["error"]["message"]
    assert not [*(training.folder / "jobs").iterdir()]
