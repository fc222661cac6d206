"""What a job would do: the plan of one that is then trained, and the refusals of those that cannot be."""

import asyncio
import json
from typing import Any

import httpx
import pytest

from loradeck.api.auth import ApiKey, ApiKeys
from loradeck.live.config import LiveConfig
from loradeck.live.live_training import LiveTraining
from loradeck.live.records import Quota

from .conftest import LocalServer
from .test_file_check import CHAT, PAIR, lines, upload
from .test_files import sha
from .test_fine_tuning import LORA, dataset

PLAN, JOBS = "/v1/fine_tuning/plan", "/v1/fine_tuning/jobs"
KEYS = ApiKeys(
    [
        ApiKey("alice", sha("ka"), adapters=("mine-*", "poet"), train=True, create=("mine-*",)),
        ApiKey("bob", sha("kb"), train=True, quota=Quota(max_job_tokens=10)),
        ApiKey("carol", sha("kc")),
    ]
)


def plan(server: LocalServer, content: bytes, path: str = PLAN, **body: Any) -> httpx.Response:
    """Ask for the plan of a job on a new file, or at another path for the job."""
    return server.request(path, {"model": "tiny", "training_file": upload(server, content), **body})


def check_no_trace(server: LocalServer, text: str) -> None:
    training: LiveTraining = server.options["training"]
    assert training.jobs.list("") == ([], False)
    assert not [*(training.folder / "jobs").iterdir()]
    assert (training._queue.waiting, training._queue.training) == (0, 0)
    assert str(training.folder) not in text
    assert "preview-" not in text


def test_a_plan_is_what_the_job_does(training_server: LocalServer) -> None:
    training: LiveTraining = training_server.options["training"]
    content = dataset("aaaa", 5) + lines({**CHAT, "id": 1})
    body = {
        "model": "tiny",
        "training_file": upload(training_server, content),
        "validation_file": upload(training_server, dataset("bbbb", 3)),
        "suffix": "ah",
        "hyperparameters": {"n_epochs": 2, "batch_size": 4},
        "lora": {**LORA, "warmup_ratio": 0.5, "last_layers": 1, "samples": 1},
    }
    response = training_server.request(PLAN, body)
    assert response.status_code == 200, response.text
    check_no_trace(training_server, response.text)
    result = response.json()
    tokenizer = training_server.engine.base.tokenizer
    lengths = [
        len(tokenizer.apply_chat_template(json.loads(line)["messages"], return_dict=False)) - 1  # its last line feed
        for line in content.splitlines()
    ]
    settings = {each["name"]: (each["value"], each["reason"]) for each in result.pop("settings")}
    assert settings["learning_rate"] == (0.01, "as given")
    assert settings["r"] == (2, "as given")
    assert settings["epochs"] == (2, "as given")
    assert settings["batch_size"] == (4, "as given")
    assert settings["target_modules"] == (["q_proj"], "as given")
    assert settings["warmup_ratio"] == (0.5, "as given")
    assert settings["last_layers"] == (1, "as given")
    assert settings["samples"] == (1, "as given")
    assert settings["lora_alpha"] == (32, "fixed, so that the best learning rate barely depends on r")
    assert settings["schedule"] == ("linear", "steady decay to zero")
    supervised = result.pop("supervised")
    assert result == {
        "object": "fine_tuning.plan",
        "name": "ah",
        "form": "messages",
        "examples": 6,
        "validation_examples": 3,
        "tokens": sum(lengths),
        "longest": max(lengths),
        "truncated": 0,
        "steps": 4,
        "total_tokens": 2 * sum(lengths),
        "trainable": 2 * 2 * 64,
        "adapter_bytes": 4 * 2 * 2 * 64,
        "memory_bytes": 4 * 2 * 2 * 64 * 6,
        "learning_rate": 0.01,
        "notes": ["passed over: id (in 1)"],
    }
    assert supervised == 5 * len("aaaa|") + len("ho|")

    async def run(client: httpx.AsyncClient) -> dict[str, Any]:
        job = (await client.post(JOBS, json=body)).json()
        while job["status"] not in ("succeeded", "failed"):
            await asyncio.sleep(0.02)
            job = (await client.get(f"{JOBS}/{job['id']}")).json()
        return job

    job = training_server.run(run)
    assert (job["status"], job["total_steps"], job["trained_tokens"]) == ("succeeded", 4, result["total_tokens"])
    stored = training.store.find("ah@1")
    tensors = next(stored.path.glob("*.safetensors"))
    assert tensors.stat().st_size > result["adapter_bytes"]


def test_defaults_have_reasons(training_server: LocalServer) -> None:
    result = plan(training_server, dataset("a"), hyperparameters={"learning_rate_multiplier": 2}).json()
    assert result["name"] == "tiny-…"
    settings = {each["name"]: each for each in result["settings"]}
    assert [name for name, each in settings.items() if not each["reason"]] == []
    assert settings["r"]["value"] == 16
    assert settings["learning_rate"]["reason"].endswith("; times 2, as given")
    base = plan(training_server, dataset("a")).json()
    assert result["learning_rate"] == 2 * base["learning_rate"]
    assert base["steps"] == 3
    assert plan(training_server, dataset("a"), model="poet").json()["name"] == "poet"


def test_an_adapter_to_go_on_from(training_server: LocalServer) -> None:
    response = plan(training_server, lines(PAIR, PAIR), model="poet@1", method={"type": "dpo"}, lora={"max_steps": 5})
    assert response.status_code == 200, response.text
    result = response.json()
    size = training_server.engine.store.find("poet@1").path.joinpath("adapter_model.safetensors").stat().st_size
    assert 0 < size - result["adapter_bytes"] < 4096
    assert (result["form"], result["steps"]) == ("preference pairs", 5)
    settings = {each["name"]: (each["value"], each["reason"]) for each in result["settings"]}
    assert settings["r"] == (2, "as poet@1 has it")
    assert settings["lora_alpha"] == (4, "as poet@1 has it")
    assert {path.rpartition(".")[2] for path in settings["target_modules"][0]} == {"o_proj", "q_proj"}
    assert settings["max_steps"] == (5, "as given")
    assert "epochs" not in settings
    check_no_trace(training_server, response.text)


@pytest.mark.parametrize(
    ("content", "body", "status", "param", "says"),
    [
        (lines(CHAT), {"training_file": "file-none"}, 404, "training_file", "there is no file 'file-none'"),
        (lines(CHAT), {"validation_file": "file-none"}, 404, "validation_file", "there is no file 'file-none'"),
        (lines(CHAT), {"model": "nobody"}, 404, "model", "nobody"),
        (lines(CHAT), {"lora": {"rank": 8}}, 400, "lora", "lora.rank: unknown key"),
        (lines(CHAT), {"lora": {"r": 0, "epochs": -1}}, 400, "lora", "epochs must be"),
        (lines(CHAT), {"lora": {"target_modules": ["nothing"]}}, 400, "lora", "nothing"),
        (lines(CHAT), {"lora": {"last_layers": 100}}, 400, "lora", "last_layers is 100"),
        (lines(CHAT), {"suffix": "a/poet"}, 400, "suffix", "'/'"),
        (lines(CHAT), {"lora": {"r": 5}, "model": "poet"}, 400, "lora", "other settings"),
        (lines(CHAT), {"hyperparameters": {"n_epochs": 0}}, 400, "hyperparameters.n_epochs", ">= 1"),
        (lines(CHAT), {"method": {"type": "dpo"}}, 400, "training_file", "a.jsonl has no preference pairs"),
        (lines(PAIR), {}, 400, "training_file", "a.jsonl has preference pairs\nGive the method dpo."),
        (b"{}\n" * 10_000, {}, 400, "training_file", "10,000"),
        (b"\xff\x00\xd8" * 100, {}, 400, "training_file", "a.jsonl"),
        (b"\n", {}, 400, "training_file", "is empty"),
        (
            lines({"text": "a" * 5000}),
            {"lora": {"max_length": 9000}},
            400,
            "lora",
            "the longest example has 5001 tokens; the context of tiny is",
        ),
    ],
)
def test_what_a_job_would_fail_of_is_refused(
    training_server: LocalServer, content: bytes, body: dict[str, Any], status: int, param: str, says: str
) -> None:
    response = plan(training_server, content, **body)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert says in error["message"]
    assert (error["param"] or "").startswith(param)
    check_no_trace(training_server, response.text)


def test_a_wrong_validation_file_is_named(training_server: LocalServer) -> None:
    wrong = upload(training_server, b"{}\n", "held.jsonl")
    response = plan(training_server, lines(CHAT), validation_file=wrong)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "validation_file")
    assert error["message"].startswith("held.jsonl has 1 problem")
    check_no_trace(training_server, response.text)


def test_a_job_that_needs_too_much_memory(training_server: LocalServer) -> None:
    training: LiveTraining = training_server.options["training"]
    training.previews._config = LiveConfig(train_bytes=1000)
    response = plan(training_server, lines(CHAT))
    assert response.status_code == 400
    assert "bytes for its adapter and optimizer" in response.json()["error"]["message"]


def test_keys(training_server: LocalServer) -> None:
    file = upload(training_server, dataset("a"), owner="alice")
    bobs = upload(training_server, dataset("a"), owner="bob")
    server = training_server.configured(**training_server.options, keys=KEYS)
    body = {"model": "tiny", "training_file": file, "suffix": "mine-a"}
    assert server.request(PLAN, body, key="ka").status_code == 200
    for key, changes, status, says in (
        ("ka", {"suffix": "poet"}, 403, "may not create the adapter 'poet'"),
        ("ka", {"model": "pirate"}, 403, "may not use the adapter 'pirate'"),
        ("ka", {"training_file": bobs}, 404, "there is no file"),
        ("kb", {}, 404, "there is no file"),
        ("kb", {"training_file": bobs}, 429, "this API key may use 10 for a job"),
        ("kc", {}, 403, "may not train"),
    ):
        response = server.request(PLAN, {**body, **changes}, key=key)
        assert response.status_code == status, response.text
        assert says in response.json()["error"]["message"]
