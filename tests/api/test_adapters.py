"""Models, loading and unloading adapters, llama.cpp's scales, the small routes, and the metrics."""

import asyncio
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import load_file, save_file

from loradeck import Adapter, AdapterStore, LoraConfig, __version__
from loradeck.api.catalogue import Catalogue
from loradeck.api.metrics import Metrics

from .conftest import TIMEOUT, LocalServer, random_adapter

pytestmark = pytest.mark.slow

LOAD, UNLOAD, CHAT = "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/chat/completions"
REQUEST: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0, "max_tokens": 6}


def chat(server: LocalServer, **fields: Any) -> str:
    return str(server.request(CHAT, {**REQUEST, **fields}).json()["choices"][0]["message"]["content"])


def samples(server: LocalServer) -> dict[tuple[str, ...], float]:
    text = server.request("/metrics").text
    return {
        (sample.name, *(sample.labels[name] for name in sorted(sample.labels) if name != "model_name")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_models(server: LocalServer, store: AdapterStore) -> None:
    chat(server, model="poet")
    base, *adapters = server.request("/v1/models").json()["data"]
    assert (base["id"], base["parent"], base["max_model_len"], base["object"]) == ("tiny", None, 256, "model")
    assert "adapter" not in base
    assert [model["id"] for model in adapters] == ["pirate", "poet", "team-a"]
    pirate, poet, _ = adapters
    assert (poet["parent"], poet["root"]) == ("tiny", "poet@2")
    assert poet["adapter"] | {"last_used": 0} == {
        "rank": 3,
        "alpha": 6,
        "targets": ["o_proj", "q_proj"],
        "bytes": store.find("poet").facts.nbytes,
        "sha256": store.find("poet").sha256(),
        "base_sha256": None,
        "version": 2,
        "loaded": True,
        "tier": "device",
        "pinned": False,
        "last_used": 0,
    }
    assert abs(poet["adapter"]["last_used"] - poet["created"]) < 600
    assert (pirate["adapter"]["loaded"], pirate["adapter"]["tier"]) == (False, "disk")


def test_a_model_by_any_of_its_names(server: LocalServer, store: AdapterStore) -> None:
    assert server.request("/v1/models/tiny").json()["id"] == "tiny"
    assert server.request("/v1/models/org/tiny").json()["id"] == "org/tiny"
    assert server.request("/v1/models/tiny:poet@1").json()["adapter"]["sha256"] == store.find("poet@1").sha256()
    for name in ("nobody", "poet@7", "poet*0.5+pirate"):
        assert server.request(f"/v1/models/{name}").status_code == 404
    assert server.request("/v1/models/").json() == server.request("/v1/models").json()


def test_load_and_unload(server: LocalServer) -> None:
    loaded = server.request(LOAD, {"lora_name": "poet", "lora_path": "poet"})
    assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'poet' added successfully.")
    again = server.request(LOAD, {"lora_name": "poet", "lora_path": "poet"})
    assert (again.status_code, again.json()["error"]["type"]) == (400, "InvalidUserInput")
    assert server.request(LOAD, {"lora_name": "poet", "load_inplace": True}).status_code == 200
    assert server.request("/v1/models/poet").json()["adapter"]["loaded"]
    unloaded = server.request(UNLOAD, {"lora_name": "poet", "lora_int_id": 3})
    assert (unloaded.status_code, unloaded.text) == (200, "Success: LoRA adapter 'poet' removed successfully.")
    assert not server.request("/v1/models/poet").json()["adapter"]["loaded"]
    assert server.request(UNLOAD, {"lora_name": "poet"}).status_code == 404
    assert server.request(UNLOAD, {"lora_name": "nobody"}).status_code == 404
    assert server.request(LOAD, {"lora_name": "nobody"}).status_code == 404
    assert server.request(LOAD, {}).json()["error"]["param"] == "lora_name"
    assert server.request(CHAT, {**REQUEST, "model": "poet"}).status_code == 200  # loaded again on demand


def test_a_folder_outside_the_store_is_published(server: LocalServer, store: AdapterStore, tmp_path: Path) -> None:
    folder = random_adapter(9).save(tmp_path / "elsewhere")
    assert server.request(LOAD, {"lora_name": "new", "lora_path": str(folder)}).status_code == 200
    new = chat(server, model="new")
    assert store.versions("new") == [1]
    taken = server.request(LOAD, {"lora_name": "poet", "lora_path": str(folder)})
    assert (taken.status_code, taken.json()["error"]["param"]) == (400, "lora_name")
    before = chat(server, model="poet")
    assert (
        server.request(LOAD, {"lora_name": "poet", "lora_path": str(folder), "load_inplace": True}).status_code == 200
    )
    assert before != chat(server, model="poet") == new
    assert before == chat(server, model="poet@2")
    for path in ("elsewhere", str(tmp_path / "nothing"), "../elsewhere"):
        missing = server.request(LOAD, {"lora_name": "x", "lora_path": path})
        assert missing.status_code == 404
        assert "the name of an adapter in the store, or an absolute path" in missing.json()["error"]["message"]
    assert server.request(LOAD, {"lora_name": "a/b", "lora_path": str(folder)}).status_code == 400
    assert server.request(LOAD, {"lora_name": "x", "lora_path": str(tmp_path)}).status_code == 422
    assert server.request(LOAD, {"lora_name": "alias", "lora_path": "poet@1"}).status_code == 200
    assert chat(server, model="alias") == chat(server, model="poet@1")


def unusable_adapter(folder: Path, kind: str) -> Path:
    """A folder from which no adapter of the tiny base can be loaded."""
    adapter = random_adapter(9, r=60 if kind == "too large" else 2)
    if kind == "other shapes":
        path = "model.layers.0.self_attn.q_proj"
        adapter = Adapter.of(LoraConfig(r=2, target_modules=["q_proj"]), {path: (torch.ones(2, 32), torch.ones(64, 2))})
    if kind == "another base":
        adapter.describe(base_fingerprint="0" * 64)
    adapter.save(folder)
    file = folder / "adapter_model.safetensors"
    tensors, metadata = load_file(file), {"format": "pt"}
    if kind == "NaN":
        next(iter(tensors.values()))[0, 0] = torch.nan
        save_file(tensors, file, metadata)
    if kind == "a missing tensor":
        tensors.popitem()
        save_file(tensors, file, metadata)
    if kind == "another lm_head":
        save_file({**tensors, "base_model.model.lm_head.weight": torch.ones(260, 64)}, file, metadata)
    if kind == "cut short":
        file.write_bytes(file.read_bytes()[:-4])
    if kind == "no config":
        (folder / "adapter_config.json").unlink()
    return folder


def contents(server: LocalServer, store: AdapterStore) -> tuple[object, ...]:
    """What a failed load may not change: the store, the adapters in memory, the list of models."""
    versions = {name: store.versions(name) for name in store.names()}
    models = server.request("/v1/models").json()["data"]
    return versions, server.engine.adapter_cache.bank.names(), [(model["id"], model["root"]) for model in models]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    "kind",
    [
        "other shapes",
        "another base",
        "NaN",
        "a missing tensor",
        "another lm_head",
        "cut short",
        "no config",
        "too large",
    ],
)
def test_a_folder_that_cannot_be_loaded_leaves_nothing_behind(
    server: LocalServer, store: AdapterStore, tmp_path: Path, kind: str, inplace: bool
) -> None:
    server.engine.adapter_cache.budget = 100_000
    server.engine.adapter_cache.bank.model.fingerprint = server.engine.base.fingerprint
    folder = unusable_adapter(tmp_path / "elsewhere", kind)
    chat(server, model="poet")
    before = contents(server, store)
    body = {"lora_name": "poet" if inplace else "new", "lora_path": str(folder), "load_inplace": inplace}
    failure = server.request(LOAD, body)
    assert failure.status_code == (400 if kind == "too large" else 422), failure.text
    assert contents(server, store) == before
    shutil.rmtree(folder)
    random_adapter(9).save(folder)
    assert server.request(LOAD, body).status_code == 200
    assert store.versions(body["lora_name"])[-1] == (3 if inplace else 1)


def test_a_store_that_cannot_be_changed_leaves_nothing_in_memory(
    server: LocalServer, store: AdapterStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = random_adapter(9).save(tmp_path / "elsewhere")
    before = contents(server, store)
    shutil.rmtree(store.folder / ".versions")
    (store.folder / ".versions").touch()  # publishing needs a folder here
    failure = server.request(LOAD, {"lora_name": "new", "lora_path": str(folder)})
    assert failure.status_code == 422
    assert "the store cannot be changed" in failure.json()["error"]["message"]
    assert "the store the store" not in failure.text
    assert (caplog.records[-1].levelname, caplog.records[-1].args["status"]) == ("WARNING", 422)
    assert contents(server, store) == before


@pytest.mark.parametrize("folders", [1, 2])
def test_of_concurrent_loads_of_one_name_one_succeeds(
    server: LocalServer, store: AdapterStore, tmp_path: Path, folders: int
) -> None:
    paths = [str(random_adapter(seed).save(tmp_path / str(seed))) for seed in range(folders)]

    async def test(client: Any) -> list[int]:
        bodies = [{"lora_name": "new", "lora_path": paths[number % folders]} for number in range(8)]
        answers = await asyncio.gather(*(client.post(LOAD, json=body) for body in bodies))
        return sorted(answer.status_code for answer in answers)

    assert server.run(test) == [200] + [400] * 7
    assert store.versions("new") == [1]
    assert server.engine.adapter_cache.bank.names() == [store.find("new").sha256()]


def test_a_version_is_not_published_again(server: LocalServer, store: AdapterStore, tmp_path: Path) -> None:
    own = store.find("poet").path
    (tmp_path / "link").symlink_to(own)
    (tmp_path / "store link").symlink_to(store.folder)
    shutil.copytree(own, tmp_path / "copy")
    paths = [
        "poet", "poet@2", f"{store.folder}/poet", f"{store.folder}/poet/", f"{own}", f"{own}/", f"{own}/.", f"{own}//", f"{own}/../{own.name}", f"{tmp_path}/link",
        f"{tmp_path}/store link/{own.name}", f"{tmp_path}/copy",
    ]  # fmt: skip
    for path in paths:
        body = {"lora_name": "poet", "lora_path": path}
        assert server.request(LOAD, {**body, "load_inplace": True}).status_code == 200
        assert server.request(LOAD, body).status_code == 400  # it is loaded
        assert server.request(UNLOAD, body).status_code == 200
        assert server.request(LOAD, body).status_code == 200
    assert store.versions("poet") == [1, 2]
    old = {"lora_name": "poet", "lora_path": str(store.find("poet@1").path), "load_inplace": True}
    assert server.request(LOAD, old).status_code == 200  # back to the first version
    assert store.find("poet@3").sha256() == store.find("poet@1").sha256()


def test_adapters_of_the_same_content_are_loaded_and_unloaded_by_each_name(
    server: LocalServer, store: AdapterStore
) -> None:
    shutil.copytree(store.find("poet").path, store.folder / "copy")
    for name in ("poet", "copy"):
        assert server.request(LOAD, {"lora_name": name}).status_code == 200
        assert server.request(LOAD, {"lora_name": name}).status_code == 400  # it is loaded
    shutil.rmtree(store.folder / "copy")
    assert server.request(UNLOAD, {"lora_name": "copy"}).status_code == 200
    assert server.engine.adapter_cache.bank.names() == []


def test_the_names_of_the_base_are_taken(server: LocalServer, store: AdapterStore, tmp_path: Path) -> None:
    folder = random_adapter(9).save(tmp_path / "elsewhere")
    taken = server.request(LOAD, {"lora_name": "tiny", "lora_path": str(folder)})  # a request for it means the base
    assert (taken.status_code, taken.json()["error"]["param"]) == (400, "lora_name")
    assert "tiny" not in store.names()


def test_an_adapter_whose_files_are_gone_can_be_unloaded(server: LocalServer, store: AdapterStore) -> None:
    for name in ("poet", "pirate"):
        assert server.request(LOAD, {"lora_name": name}).status_code == 200
    shutil.rmtree(store.find("poet").path)
    shutil.rmtree(store.find("poet").path)  # the version before
    assert server.request(UNLOAD, {"lora_name": "poet"}).status_code == 200
    assert server.engine.adapter_cache.bank.names() == [store.find("pirate").sha256()]
    assert server.request(UNLOAD, {"lora_name": "poet"}).status_code == 404
    shutil.rmtree(store.folder)
    assert server.request(UNLOAD, {"lora_name": "pirate"}).status_code == 200
    assert server.engine.adapter_cache.bank.names() == []


def test_paths_that_cannot_be_read_are_no_errors_of_the_server(server: LocalServer, tmp_path: Path) -> None:
    for path in ("/" + "a" * 5000, "/a\0b", "a\0b", str(tmp_path / "loop"), "/" + "a/" * 3000):
        (tmp_path / "loop").unlink(missing_ok=True)
        (tmp_path / "loop").symlink_to("loop")
        assert server.request(LOAD, {"lora_name": "x", "lora_path": path}).status_code in (404, 422)


@pytest.mark.parametrize("kind", ["other shapes", "another base", "NaN", "another lm_head", "cut short", "too large"])
def test_adapters_that_cannot_be_served_are_not_listed(
    server: LocalServer, store: AdapterStore, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither as models nor as llama.cpp's adapters; the log has the reason, once."""
    server.engine.adapter_cache.budget = 100_000
    server.engine.adapter_cache.bank.model.fingerprint = server.engine.base.fingerprint
    unusable_adapter(store.folder / "broken", kind)

    async def test(client: Any) -> list[list[str]]:
        models = [(await client.get("/v1/models")).json()["data"] for _ in range(2)]
        assert (await client.get("/v1/models/broken")).status_code == (400 if kind == "too large" else 422)
        shutil.rmtree(store.folder / "broken")
        random_adapter(9).save(store.folder / "broken")
        return [
            [model["id"] for model in listed] for listed in (*models, (await client.get("/v1/models")).json()["data"])
        ]

    assert server.run(test) == [["tiny", "pirate", "poet", "team-a"]] * 2 + [
        ["tiny", "broken", "pirate", "poet", "team-a"]
    ]
    warnings = [record.getMessage() for record in caplog.records if "cannot be served" in record.msg]
    assert len(warnings) == (0 if kind == "cut short" else 1)  # the check at the start names unreadable ones
    unusable_adapter(store.folder / "broken", kind)
    assert [adapter["path"] for adapter in server.request("/lora-adapters").json()] == ["pirate", "poet", "team-a"]


def test_the_start_names_what_cannot_be_served(
    server: LocalServer, store: AdapterStore, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a+b", "team=x", "a,b", "x@y", "c:d"):
        random_adapter(9).save(store.folder / name)
    unusable_adapter(store.folder / "cut", "cut short")
    for number in range(15):
        unusable_adapter(store.folder / f"nan{number:02}", "NaN")
    Catalogue(server.engine.adapter_cache).log_problems()
    skipped, cut, *nans, rest = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert skipped == "skipped 5 folders, because no adapter can have their names: a+b, a,b, c:d, team=x, x@y"
    assert cut.startswith("cut cannot be served: ")
    assert len(nans) == 12
    assert all("NaN or Inf" in warning for warning in nans)
    assert rest == "3 more adapters cannot be served"


def test_llamacpp_scales(server: LocalServer) -> None:
    async def test(client: Any) -> list[str]:
        assert (await client.get("/lora-adapters")).json() == [
            {"id": 0, "path": "pirate", "scale": 0.0},
            {"id": 1, "path": "poet", "scale": 0.0},
            {"id": 2, "path": "team-a", "scale": 0.0},
        ]
        assert (await client.post("/lora-adapters", json=[{"id": 1, "scale": 0.5}])).json() == {"success": True}
        assert [adapter["scale"] for adapter in (await client.get("/lora-adapters")).json()] == [0.0, 0.5, 0.0]
        bodies = [
            REQUEST,
            {**REQUEST, "model": "tiny"},
            {**REQUEST, "lora": [{"id": 0, "scale": 2}]},
            {**REQUEST, "lora": []},
        ]
        completions = [(await client.post(CHAT, json=body)).json() for body in bodies]
        return [completion["choices"][0]["message"]["content"] for completion in completions]

    models = ("poet*0.5", "tiny", "pirate*2", "")
    assert server.run(test) == [chat(server, model=model) for model in models]


def test_small_routes(server: LocalServer) -> None:
    assert server.request("/health").json() == {"status": "ok"}
    assert server.request("/version").json() == {"version": __version__}
    tokens = server.request("/tokenize", {"model": "tiny", "prompt": "héllo"}).json()
    assert (tokens["count"], tokens["max_model_len"]) == (6, 256)
    assert server.request("/detokenize", {"tokens": tokens["tokens"]}).json() == {"prompt": "héllo"}
    tokenizer = server.request("/tokenizer_info").json()
    assert (tokenizer["eos_token"], tokenizer["pad_token"]) == ("<|im_end|>", "<|endoftext|>")
    assert "add_generation_prompt" in tokenizer["chat_template"]
    conversation = server.request("/tokenize", {"messages": REQUEST["messages"]}).json()
    assert conversation["count"] == server.request(CHAT, REQUEST).json()["usage"]["prompt_tokens"]


def test_drafts_are_in_the_metrics(server: LocalServer) -> None:
    chat(server, model="", max_tokens=60, ignore_eos=True, logit_bias={"70": 100})  # it says the same again and again
    counts = samples(server)
    drafts, tokens, accepted = (
        counts[f"vllm:spec_decode_num_{name}_total",] for name in ("drafts", "draft_tokens", "accepted_tokens")
    )
    assert 0 < drafts < 20
    assert 40 < accepted <= tokens
    assert counts["vllm:generation_tokens_total",] == 60


def test_metrics(server: LocalServer) -> None:
    for model in ("poet", "poet@1", "", "poet*0.5+pirate*0.5"):
        chat(server, model=model, ignore_eos=True)
    counts = samples(server)
    assert counts["vllm:num_requests_running",] == counts["vllm:num_requests_waiting",] == 0
    assert counts["vllm:generation_tokens_total",] == 24
    assert counts["vllm:request_success_total", "length"] == 4
    assert counts["vllm:time_to_first_token_seconds_count",] == 4
    assert counts["vllm:inter_token_latency_seconds_count",] == 20
    assert counts["vllm:e2e_request_latency_seconds_count",] == counts["vllm:request_queue_time_seconds_count",] == 4
    assert 0 <= counts["vllm:kv_cache_usage_perc",] <= 1
    assert counts["vllm:prefix_cache_queries_total",] >= counts["vllm:prefix_cache_hits_total",]
    assert counts["loradeck_adapter_requests_total", "poet"] == 2
    assert counts["loradeck_adapter_requests_total", "<base>"] == 1
    assert counts["loradeck_adapter_generation_tokens_total", "<blend>"] == 6
    assert counts["loradeck_adapter_time_to_first_token_seconds_count", "poet"] == 2
    assert counts["loradeck_adapter_loads_total",] == 3
    assert counts["loradeck_adapter_evictions_total",] == counts["loradeck_adapter_load_failures_total",] == 0
    assert counts["loradeck_adapter_bytes", "device"] == counts["loradeck_adapter_resident_bytes",] > 0
    assert counts["loradeck_adapter_bytes", "memory"] == 0
    assert counts["loradeck_adapter_load_seconds_total",] > 0
    assert counts["loradeck_adapter_loaded", "poet", "false", "device"] == 2
    assert counts["loradeck_adapter_loaded", "pirate", "false", "device"] == 1
    assert any(name == "vllm:lora_requests_info" for name, *_ in counts)
    prompt = server.request(CHAT, {**REQUEST, "max_tokens": 1}).json()["usage"]["prompt_tokens"]
    assert counts["vllm:prompt_tokens_total",] == 4 * prompt


@pytest.fixture
def slow_reader(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> LocalServer:
    """An application that reads an answer only once its request has ended."""
    submit, finished, ended = server.engine.submit, server.metrics.finished, threading.Event()
    monkeypatch.setattr(server.metrics, "finished", lambda *event: (finished(*event), ended.set()))

    def submit_and_wait(*args: Any, **settings: Any) -> Any:
        ended.clear()
        answer = submit(*args, **settings)
        assert ended.wait(TIMEOUT)
        return answer

    monkeypatch.setattr(server.engine, "submit", submit_and_wait)
    return server


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("begin", "end"), [(1, 2), (2, 4), (3, 6)])
def test_a_stop_string_ends_its_request_however_slow_the_reader_is(
    slow_reader: LocalServer, stream: bool, begin: int, end: int
) -> None:
    letters = slow_reader.engine.base.tokenizer("abcdefghijklmnopqrstuvwxyz")["input_ids"]  # each is a token
    body = {**REQUEST, "max_tokens": 40, "logit_bias": {str(token): 100 for token in letters}}
    text = chat(slow_reader, **body)
    stop = text[begin:end]
    body |= {"stop": ["\0no", stop]}
    if stream:
        *events, last, usage_event = slow_reader.events(CHAT, {**body, "stream_options": {"include_usage": True}})
        answer = "".join(event["choices"][0]["delta"]["content"] for event in events)
        finish, usage = last["choices"][0]["finish_reason"], usage_event["usage"]
    else:
        completion = slow_reader.request(CHAT, body).json()
        (choice,) = completion["choices"]
        answer, finish, usage = choice["message"]["content"], choice["finish_reason"], completion["usage"]
    before = text.partition(stop)[0]
    assert (answer, finish) == (before, "stop")
    assert usage["completion_tokens"] == len(before + stop)
    counts = samples(slow_reader)
    assert counts["vllm:request_success_total", "stop"] == 1
    assert counts["vllm:request_success_total", "length"] == 1  # the one without a stop string
    assert ("vllm:request_success_total", "abort") not in counts
    assert counts["vllm:generation_tokens_total",] == 40 + usage["completion_tokens"]


def test_a_loaded_adapter_without_requests_is_in_the_metrics(server: LocalServer) -> None:
    server.request(LOAD, {"lora_name": "team-a"})
    assert samples(server)["loradeck_adapter_loaded", "team-a", "false", "device"] == 1


def test_adapters_beyond_the_limit_share_a_label(server: LocalServer, metrics: Metrics) -> None:
    metrics.labels._maximum = 1
    for model in ("poet", "pirate", "team-a"):
        chat(server, model=model)
    counts = samples(server)
    assert counts["loradeck_adapter_requests_total", "poet"] == 1
    assert counts["loradeck_adapter_requests_total", "<other>"] == 2
    assert counts["loradeck_adapter_loaded", "<other>", "false", "device"] == 2
