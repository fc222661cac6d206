"""What is there, and what is resident: models, loading and unloading by hand, llama.cpp's scales, metrics, the small routes."""

import threading
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from loradeck import AdapterStore, __version__
from loradeck.api.metrics import Metrics

from .conftest import Serve, adapter

LOAD, UNLOAD, CHAT = "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/chat/completions"
SAY: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0, "max_tokens": 6}


def said(serve: Serve, **fields: Any) -> str:
    return str(serve.ask(CHAT, {**SAY, **fields}).json()["choices"][0]["message"]["content"])


def samples(serve: Serve) -> dict[tuple[str, ...], float]:
    text = serve.ask("/metrics").text
    return {
        (own.name, *(own.labels[name] for name in sorted(own.labels) if name != "model_name")): own.value
        for family in text_string_to_metric_families(text)
        for own in family.samples
    }


def test_models(serve: Serve, store: AdapterStore) -> None:
    said(serve, model="poet")
    base, *adapters = serve.ask("/v1/models").json()["data"]
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


def test_one_model(serve: Serve, store: AdapterStore) -> None:
    assert serve.ask("/v1/models/tiny").json()["id"] == "tiny"
    assert serve.ask("/v1/models/org/tiny").json()["id"] == "org/tiny"
    assert serve.ask("/v1/models/tiny:poet@1").json()["adapter"]["sha256"] == store.find("poet@1").sha256()
    for name in ("nobody", "poet@7", "poet*0.5+pirate"):
        assert serve.ask(f"/v1/models/{name}").status_code == 404


def test_load_and_unload(serve: Serve) -> None:
    answer = serve.ask(LOAD, {"lora_name": "poet", "lora_path": "poet"})
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'poet' added successfully.")
    again = serve.ask(LOAD, {"lora_name": "poet", "lora_path": "poet"})
    assert (again.status_code, again.json()["error"]["type"]) == (400, "InvalidUserInput")
    assert serve.ask(LOAD, {"lora_name": "poet", "load_inplace": True}).status_code == 200
    assert serve.ask("/v1/models/poet").json()["adapter"]["loaded"]
    gone = serve.ask(UNLOAD, {"lora_name": "poet", "lora_int_id": 3})
    assert (gone.status_code, gone.text) == (200, "Success: LoRA adapter 'poet' removed successfully.")
    assert not serve.ask("/v1/models/poet").json()["adapter"]["loaded"]
    assert serve.ask(UNLOAD, {"lora_name": "poet"}).status_code == 404
    assert serve.ask(UNLOAD, {"lora_name": "nobody"}).status_code == 404
    assert serve.ask(LOAD, {"lora_name": "nobody"}).status_code == 404
    assert serve.ask(LOAD, {}).json()["error"]["param"] is None
    assert serve.ask(CHAT, {**SAY, "model": "poet"}).status_code == 200  # it comes back when asked for


def test_a_folder_from_elsewhere_is_published(serve: Serve, store: AdapterStore, tmp_path: Path) -> None:
    folder = adapter(9).save(tmp_path / "elsewhere")
    assert serve.ask(LOAD, {"lora_name": "new", "lora_path": str(folder)}).status_code == 200
    new = said(serve, model="new")
    assert store.versions("new") == [1]
    taken = serve.ask(LOAD, {"lora_name": "poet", "lora_path": str(folder)})
    assert (taken.status_code, taken.json()["error"]["param"]) == (400, "lora_name")
    before = said(serve, model="poet")
    assert serve.ask(LOAD, {"lora_name": "poet", "lora_path": str(folder), "load_inplace": True}).status_code == 200
    assert before != said(serve, model="poet") == new
    assert before == said(serve, model="poet@2")
    for path in ("elsewhere", str(tmp_path / "nothing"), "../elsewhere"):
        assert serve.ask(LOAD, {"lora_name": "x", "lora_path": path}).status_code == 404
    assert serve.ask(LOAD, {"lora_name": "a/b", "lora_path": str(folder)}).status_code == 400
    assert serve.ask(LOAD, {"lora_name": "x", "lora_path": str(tmp_path)}).status_code == 422
    assert serve.ask(LOAD, {"lora_name": "alias", "lora_path": "poet@1"}).status_code == 200
    assert said(serve, model="alias") == said(serve, model="poet@1")


def test_llama_cpps_scales(serve: Serve) -> None:
    async def test(client: Any) -> list[str]:
        assert (await client.get("/lora-adapters")).json() == [
            {"id": 0, "path": "pirate", "scale": 0.0},
            {"id": 1, "path": "poet", "scale": 0.0},
            {"id": 2, "path": "team-a", "scale": 0.0},
        ]
        assert (await client.post("/lora-adapters", json=[{"id": 1, "scale": 0.5}])).json() == {"success": True}
        assert [own["scale"] for own in (await client.get("/lora-adapters")).json()] == [0.0, 0.5, 0.0]
        asked = [SAY, {**SAY, "model": "tiny"}, {**SAY, "lora": [{"id": 0, "scale": 2}]}, {**SAY, "lora": []}]
        answers = [(await client.post(CHAT, json=body)).json() for body in asked]
        return [answer["choices"][0]["message"]["content"] for answer in answers]

    models = ("poet*0.5", "tiny", "pirate*2", "")
    assert serve.run(test) == [said(serve, model=model) for model in models]


def test_small_routes(serve: Serve) -> None:
    assert serve.ask("/health").json() == {"status": "ok"}
    assert serve.ask("/version").json() == {"version": __version__}
    tokens = serve.ask("/tokenize", {"model": "tiny", "prompt": "héllo"}).json()
    assert (tokens["count"], tokens["max_model_len"]) == (6, 256)
    assert serve.ask("/detokenize", {"tokens": tokens["tokens"]}).json() == {"prompt": "héllo"}
    tokenizer = serve.ask("/tokenizer_info").json()
    assert (tokenizer["eos_token"], tokenizer["pad_token"]) == ("<|im_end|>", "<|endoftext|>")
    assert "add_generation_prompt" in tokenizer["chat_template"]
    chat = serve.ask("/tokenize", {"messages": SAY["messages"]}).json()
    assert chat["count"] == serve.ask(CHAT, SAY).json()["usage"]["prompt_tokens"]


def test_metrics(serve: Serve) -> None:
    for model in ("poet", "poet@1", "", "poet*0.5+pirate*0.5"):
        said(serve, model=model, ignore_eos=True)
    told = samples(serve)
    assert told["vllm:num_requests_running",] == told["vllm:num_requests_waiting",] == 0
    assert told["vllm:generation_tokens_total",] == 24
    assert told["vllm:request_success_total", "length"] == 4
    assert told["vllm:time_to_first_token_seconds_count",] == 4
    assert told["vllm:inter_token_latency_seconds_count",] == 20
    assert told["vllm:e2e_request_latency_seconds_count",] == told["vllm:request_queue_time_seconds_count",] == 4
    assert 0 <= told["vllm:kv_cache_usage_perc",] <= 1
    assert told["vllm:prefix_cache_queries_total",] >= told["vllm:prefix_cache_hits_total",]
    assert told["loradeck_adapter_requests_total", "poet"] == 2
    assert told["loradeck_adapter_requests_total", "<base>"] == 1
    assert told["loradeck_adapter_generation_tokens_total", "<blend>"] == 6
    assert told["loradeck_adapter_time_to_first_token_seconds_count", "poet"] == 2
    assert told["loradeck_adapter_loads_total",] == 3
    assert told["loradeck_adapter_evictions_total",] == 0
    assert told["loradeck_adapter_resident_bytes",] > 0
    assert told["loradeck_adapter_load_seconds_total",] > 0
    assert told["loradeck_adapter_loaded", "poet", "false", "device"] == 2
    assert told["loradeck_adapter_loaded", "pirate", "false", "device"] == 1
    assert any(name == "vllm:lora_requests_info" for name, *_ in told)
    prompt = serve.ask(CHAT, {**SAY, "max_tokens": 1}).json()["usage"]["prompt_tokens"]
    assert told["vllm:prompt_tokens_total",] == 4 * prompt


@pytest.fixture
def slow_reader(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> Serve:
    """An application that reads an answer only once its request has ended."""
    submit, finished, ended = serve.engine.submit, serve.metrics.finished, threading.Event()
    monkeypatch.setattr(serve.metrics, "finished", lambda *event: (finished(*event), ended.set()))

    def submit_and_wait(*args: Any, **settings: Any) -> Any:
        ended.clear()
        answer = submit(*args, **settings)
        assert ended.wait(120)
        return answer

    monkeypatch.setattr(serve.engine, "submit", submit_and_wait)
    return serve


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("begin", "end"), [(1, 2), (2, 4), (3, 6)])
def test_a_stop_string_ends_its_request_however_slow_the_reader_is(
    slow_reader: Serve, stream: bool, begin: int, end: int
) -> None:
    letters = slow_reader.engine.base.tokenizer("abcdefghijklmnopqrstuvwxyz")["input_ids"]  # each is a token
    body = {**SAY, "max_tokens": 40, "logit_bias": {str(token): 100 for token in letters}}
    text = said(slow_reader, **body)
    stop = text[begin:end]
    body |= {"stop": ["\0no", stop]}
    if stream:
        *events, last, spent = slow_reader.events(CHAT, {**body, "stream_options": {"include_usage": True}})
        answer = "".join(event["choices"][0]["delta"]["content"] for event in events)
        finish, usage = last["choices"][0]["finish_reason"], spent["usage"]
    else:
        whole = slow_reader.ask(CHAT, body).json()
        (choice,) = whole["choices"]
        answer, finish, usage = choice["message"]["content"], choice["finish_reason"], whole["usage"]
    before = text.partition(stop)[0]
    assert (answer, finish) == (before, "stop")
    assert usage["completion_tokens"] == len(before + stop)
    counts = samples(slow_reader)
    assert counts["vllm:request_success_total", "stop"] == 1
    assert counts["vllm:request_success_total", "length"] == 1  # the one without a stop string
    assert ("vllm:request_success_total", "abort") not in counts
    assert counts["vllm:generation_tokens_total",] == 40 + usage["completion_tokens"]


def test_an_adapter_that_nobody_asked_for_is_seen_where_it_is_loaded(serve: Serve) -> None:
    serve.ask(LOAD, {"lora_name": "team-a"})
    assert samples(serve)["loradeck_adapter_loaded", "team-a", "false", "device"] == 1


def test_adapters_beyond_the_busiest_share_a_label(serve: Serve, metrics: Metrics) -> None:
    metrics.labels._most = 1
    for model in ("poet", "pirate", "team-a"):
        said(serve, model=model)
    told = samples(serve)
    assert told["loradeck_adapter_requests_total", "poet"] == 1
    assert told["loradeck_adapter_requests_total", "<other>"] == 2
    assert told["loradeck_adapter_loaded", "<other>", "false", "device"] == 2
