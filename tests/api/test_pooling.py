"""Classes, vectors and scores over HTTP: vLLM's and OpenAI's shapes, adapters side by side, and what is refused."""

import asyncio
import base64
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import schemathesis
import torch
from hypothesis import HealthCheck, given, settings
from safetensors.torch import load_file, save_file
from schemathesis import GenerationMode
from tests.classifiers import make, wrapped
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from loradeck import AdapterStore, Base
from loradeck.api.app import app
from loradeck.api.config import ServerConfig
from loradeck.api.metrics import Metrics
from loradeck.serve.config import EngineConfig
from loradeck.serve.pooling_engine import PoolingEngine

from .conftest import TIMEOUT, LocalServer, until
from .test_clients import CHECKS

# PEFT asks for an attribute of transformers by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
LABELS = {"three": 3, "five": 5, "one": 1}
TEXTS = ["a", "some longer text", "ab"]
Serve = Callable[..., LocalServer]


@pytest.fixture
def serve(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Iterator[Serve]:
    """Return a function that serves a tiny BERT for a task, with the adapters `three`, `five` and `one`."""
    with ExitStack() as stack:

        def start(task: Any, tokenizer: PreTrainedTokenizerFast = tiny_tokenizer, **config: Any) -> LocalServer:
            kind = "classify" if task == "reward" else task
            model = make("bert", kind, 1 if task == "reward" else 2, 1)
            for name, value in config.items():
                setattr(model.config, name, value)
            model.save_pretrained(tmp_path / "tiny")
            tokenizer.save_pretrained(tmp_path / "tiny")
            for name, labels in LABELS.items():
                wrapped("bert", kind, labels, labels).save_pretrained(str(tmp_path / "store" / name))
            base = Base.load(tmp_path / "tiny", dtype="float32", device="cpu", task=task)
            metrics = Metrics("tiny")
            engine = PoolingEngine(base, AdapterStore(tmp_path / "store"), EngineConfig(), observer=metrics)
            return LocalServer(stack.enter_context(engine), metrics)

        yield start


@pytest.fixture
def pair_tokenizer(tiny_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """It marks two texts as BERT's does, and says which token is whose."""
    inner = Tokenizer.from_str(tiny_tokenizer.backend_tokenizer.to_str())
    inner.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>",
        pair="<|im_start|> $A <|im_end|> $B:1 <|im_end|>:1",
        special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)],
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<|endoftext|>", model_input_names=names)


def theirs(task: str, name: str, text: str, tokenizer: PreTrainedTokenizerFast) -> Any:
    """What PEFT's model computes for one text."""
    model = wrapped("bert", task, LABELS[name], LABELS[name])
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt"))


def post(server: LocalServer, path: str, **body: Any) -> Any:
    response = server.request(path, body)
    assert response.status_code == 200, response.text
    return response.json()


def refusal(server: LocalServer, path: str, **body: Any) -> tuple[int, str, str | None]:
    response = server.request(path, body)
    error = response.json()["error"]
    assert response.status_code == error["code"]
    return error["code"], error["message"], error["param"]


# ---- classes


def test_classes_have_vllms_shape(serve: Serve, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    server = serve("classify")
    body = post(server, "/classify", model="three", input=TEXTS)
    assert body.keys() == {"id", "object", "created", "model", "data", "usage"}
    assert (body["object"], body["model"], body["id"][:9]) == ("list", "three", "classify-")
    tokens = sum(map(len, TEXTS))
    assert {name: body["usage"][name] for name in ("prompt_tokens", "total_tokens", "completion_tokens")} == {
        "prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0,
    }  # fmt: skip
    for index, (item, text) in enumerate(zip(body["data"], TEXTS, strict=True)):
        probs = theirs("classify", "three", text, tiny_tokenizer).logits[0].softmax(-1)
        assert item.keys() == {"index", "label", "probs", "num_classes"}
        assert (item["index"], item["num_classes"]) == (index, 3)
        assert item["probs"] == pytest.approx(probs.tolist(), rel=1e-5, abs=1e-7)
        assert item["label"] == f"LABEL_{int(probs.argmax())}"


def test_adapters_and_the_base_side_by_side(serve: Serve, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    server = serve("classify")
    names = ["three", "five", "one", "", "tiny", "tiny:five"] * 3

    async def test(client: httpx.AsyncClient) -> list[Any]:
        bodies = [{"model": name, "input": "some text"} for name in names]
        return [
            answer.json() for answer in await asyncio.gather(*(client.post("/classify", json=body) for body in bodies))
        ]

    answers = server.run(test)
    assert [answer["data"][0]["num_classes"] for answer in answers] == [3, 5, 1, 2, 2, 5] * 3
    logits = theirs("classify", "one", "some text", tiny_tokenizer).logits[0]
    assert answers[2]["data"][0]["probs"] == pytest.approx(logits.sigmoid().tolist(), rel=1e-5)
    raw = post(server, "/classify", model="one", input="some text", use_activation=False)
    assert raw["data"][0]["probs"] == pytest.approx(logits.tolist(), rel=1e-5)


def test_labels_have_the_adapters_names_or_the_bases(serve: Serve, tmp_path: Path) -> None:
    server = serve("classify", id2label={0: "no", 1: "yes"})
    path = tmp_path / "store" / "three" / "adapter_model.safetensors"
    record = json.dumps({"labels": json.dumps(["bad", "so-so", "good"])})
    save_file(load_file(path), path, {"format": "pt", "loradeck": record})
    for model, names in (("three", {"bad", "so-so", "good"}), ("", {"no", "yes"})):
        (item,) = post(server, "/classify", model=model, input="text")["data"]
        assert item["label"] in names
    assert post(server, "/classify", model="five", input="text")["data"][0]["label"].startswith("LABEL_")


def test_messages_and_token_ids(serve: Serve, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    server = serve("classify")
    messages = [{"role": "user", "content": "hi"}]
    ids = tiny_tokenizer.apply_chat_template(messages, return_dict=False)
    classes = post(server, "/classify", input=ids)["data"]
    assert post(server, "/classify", messages=messages)["data"] == classes
    assert post(server, "/classify", input=[ids])["data"] == classes


# ---- vectors


def test_vectors_by_openais_client(serve: Serve, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with (
        serve("embed").listening() as (url, _),
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT) as client,
    ):
        floats = client.embeddings.create(model="three", input=TEXTS, encoding_format="float")
        default = client.embeddings.create(model="three", input=TEXTS)  # which is base64, that the client decodes
        ids = client.embeddings.create(model="three", input=[tiny_tokenizer(text)["input_ids"] for text in TEXTS])
        assert floats.usage.prompt_tokens == floats.usage.total_tokens == sum(map(len, TEXTS))
        assert (floats.model, floats.object, [each.index for each in floats.data]) == ("three", "list", [0, 1, 2])
        for index, text in enumerate(TEXTS):
            mean = theirs("embed", "three", text, tiny_tokenizer).last_hidden_state[0].mean(0).tolist()
            for response in (floats, default, ids):
                assert response.data[index].embedding == pytest.approx(mean, rel=1e-4, abs=1e-5)
                assert response.data[index].object == "embedding"
        one = client.embeddings.create(model="", input="a")
        assert len(one.data[0].embedding) == 32
        with pytest.raises(openai.BadRequestError, match="not trained for vectors that are cut"):
            client.embeddings.create(model="", input="a", dimensions=8)
        with pytest.raises(openai.NotFoundError):
            client.embeddings.create(model="nobody", input="a")
        with pytest.raises(openai.BadRequestError, match="--task generate"):
            client.completions.create(model="", prompt="a")


def test_base64_is_float32(serve: Serve) -> None:
    server = serve("embed")
    (item,) = post(server, "/v1/embeddings", input="text", encoding_format="base64")["data"]
    values = np.frombuffer(base64.b64decode(item["embedding"]), dtype="<f4")
    (plain,) = post(server, "/v1/embeddings", input="text")["data"]
    assert values.tolist() == plain["embedding"]


def test_dimensions_of_a_model_that_was_trained_for_them(serve: Serve) -> None:
    server = serve("embed", matryoshka_dimensions=[8, 16])
    (whole,) = post(server, "/v1/embeddings", input="text", dimensions=32)["data"]
    (cut,) = post(server, "/v1/embeddings", input="text", dimensions=8)["data"]
    assert cut["embedding"] == whole["embedding"][:8]
    status, message, param = refusal(server, "/v1/embeddings", input="text", dimensions=9)
    assert (status, param) == (400, "dimensions")
    assert "8, 16 dimensions, not 9" in message


# ---- pooling


@pytest.mark.parametrize(
    ("task", "vllms"), [("classify", "classify"), ("tokens", "token_classify"), ("embed", "embed")]
)
def test_pooling_gives_what_the_base_computes(
    task: str, vllms: str, serve: Serve, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    server = serve(task)
    body = post(server, "/pooling", model="five", input=TEXTS, task=vllms)
    assert (body["object"], body["id"][:5]) == ("list", "pool-")
    for item, text in zip(body["data"], TEXTS, strict=True):
        assert item["object"] == "pooling"
        output = theirs(task, "five", text, tiny_tokenizer)
        vector = output.last_hidden_state[0].mean(0) if task == "embed" else output.logits[0].softmax(-1)
        assert np.array(item["data"]) == pytest.approx(vector.numpy(), rel=1e-4, abs=1e-5)
    status, message, _ = refusal(server, "/pooling", input="a", task="token_embed")
    assert (status, vllms in message) == (400, True)


def test_a_reward_is_not_squeezed(serve: Serve, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    server = serve("reward")
    logit = theirs("classify", "one", "a", tiny_tokenizer).logits[0]
    assert post(server, "/pooling", model="one", input="a")["data"][0]["data"] == pytest.approx(
        logit.tolist(), rel=1e-5
    )
    squeezed = post(server, "/pooling", model="one", input="a", use_activation=True)
    assert squeezed["data"][0]["data"] == pytest.approx(logit.sigmoid().tolist(), rel=1e-5)


# ---- scores


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
def test_scores_of_a_head_that_reads_both_texts(
    path: str, serve: Serve, pair_tokenizer: PreTrainedTokenizerFast
) -> None:
    server = serve("classify", pair_tokenizer)
    body = post(server, path, model="one", text_1="what", text_2=["this", "or that"])
    assert [item["object"] for item in body["data"]] == ["score", "score"]
    model = wrapped("bert", "classify", 1, 1)
    for item, text in zip(body["data"], ["this", "or that"], strict=True):
        inputs = pair_tokenizer("what", text, return_tensors="pt")
        assert inputs["token_type_ids"].max() == 1
        with torch.no_grad():
            score = model(**inputs).logits[0].sigmoid()
        assert item["score"] == pytest.approx(float(score), rel=1e-5)
    other = post(server, path, model="one", queries=["what", "what"], documents=["this", "or that"])
    assert other["data"] == body["data"]
    assert refusal(server, path, model="one", text_1=["a", "b"], text_2="c")[0] == 400
    assert refusal(server, path, model="one", text_1="a")[2] == "text_2"
    assert "has 3 labels" in refusal(server, path, model="three", text_1="a", text_2="b")[1]


def test_scores_of_vectors_are_their_cosine(serve: Serve) -> None:
    server = serve("embed")
    data = post(server, "/v1/embeddings", model="one", input=["what", "this", "what"])["data"]
    a, b, _ = (np.array(item["embedding"]) for item in data)
    scores = post(server, "/score", model="one", text_1="what", text_2=["this", "what"])["data"]
    cosine = float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert [item["score"] for item in scores] == pytest.approx([cosine, 1.0], rel=1e-4)


# ---- what is refused, and what is shared with generation


PATHS = ["/classify", "/v1/embeddings", "/pooling", "/score", "/v1/score"]
GENERATING = ["/v1/completions", "/v1/chat/completions", "/evaluate"]


@pytest.mark.parametrize(
    ("task", "paths"),
    [
        ("classify", {"/v1/embeddings": "embed"}),
        ("tokens", {"/classify": "classify", "/v1/embeddings": "embed", "/score": "classify", "/v1/score": "classify"}),
        ("reward", {"/classify": "classify", "/v1/embeddings": "embed"}),
        ("embed", {"/classify": "classify"}),
    ],
)
def test_routes_of_other_tasks_name_the_flag(task: str, paths: dict[str, str], serve: Serve) -> None:
    server = serve(task)
    for path, needed in {**paths, **dict.fromkeys(GENERATING, "generate")}.items():
        status, message, _ = refusal(server, path, input="a", prompt="a", messages=[])
        assert status == 400
        assert f"loaded for the task {task}" in message
        assert message.endswith(f"needs a server that was started with --task {needed}.")


def test_a_base_that_generates_names_the_flag(server: LocalServer) -> None:
    for path in PATHS:
        status, message, _ = refusal(server, path, input="a")
        assert status == 400
        assert "needs a server that was started with --task " in message


def test_invalid_requests(serve: Serve) -> None:
    server = serve("classify")
    for body, param in (
        ({"input": ""}, None),
        ({"input": []}, "input"),
        ({}, "input"),
        ({"input": "a", "messages": []}, "input"),
        ({"input": ["a", [1]]}, "input"),
        ({"input": [999]}, "input"),
        ({"input": "a" * 65}, None),
        ({"input": "a", "truncate_prompt_tokens": 3}, "truncate_prompt_tokens"),
        ({"input": "a", "use_activation": 3}, "use_activation"),
    ):
        status, message, field = refusal(server, "/classify", **body)
        assert (status, field) == (400, param), message
    limited = server.configured(config=ServerConfig(max_inputs=2))
    assert "limit of 2" in refusal(limited, "/classify", input=["a"] * 3)[1]
    status, message, param = refusal(server, "/classify", input="a", model="thre")
    assert (status, param) == (404, "model")
    assert "Did you mean three?" in message


def test_models_tokens_metrics_and_health(serve: Serve) -> None:
    server = serve("classify")
    assert [model["id"] for model in server.request("/v1/models").json()["data"]] == ["tiny", "five", "one", "three"]
    post(server, "/classify", model="three", input=TEXTS)
    assert post(server, "/tokenize", prompt="abc")["count"] == 3
    assert server.request("/health").json() == {"status": "ok"}
    text = server.request("/metrics").text
    assert 'loradeck_adapter_requests_total{adapter="three"} 3.0' in text
    assert f'vllm:prompt_tokens_total{{model_name="tiny"}} {float(sum(map(len, TEXTS)))}' in text
    assert 'vllm:request_success_total{finished_reason="stop",model_name="tiny"} 3.0' in text
    assert "kv_cache" not in text
    assert post(server, "/classify", model="five@0", input="a")["data"][0]["num_classes"] == 5


def test_what_still_waits_at_the_end_is_a_503(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve("classify")
    engine: Any = server.engine
    may_run = threading.Event()
    run = engine._loop._runner.run

    def gated(*arguments: Any) -> Any:
        assert may_run.wait(TIMEOUT)
        return run(*arguments)

    monkeypatch.setattr(engine._loop._runner, "run", gated)

    async def test(client: httpx.AsyncClient) -> httpx.Response:
        body = {"input": ["a"] * (engine.config.max_rows + 1)}  # one more than a step takes
        request = asyncio.ensure_future(client.post("/classify", json=body))
        await until(lambda: len(engine._loop.live) == len(body["input"]))
        drain = asyncio.ensure_future(asyncio.to_thread(engine.drain, 0.0))
        await until(lambda: all(answer.request.cancelled for answer in engine._loop.live))
        may_run.set()
        await drain
        return await request

    response = server.run(test)
    assert response.status_code == 503
    assert response.json()["error"]["message"] == "The server is shutting down."


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classify", "embed"])
def test_schemathesis_finds_no_fault(task: str, serve: Serve) -> None:
    server = serve(task)
    headers = {"host": "localhost"}
    schema = schemathesis.openapi.from_asgi("/openapi.json", app(server.engine, server.metrics), headers=headers)
    operations = [operation.ok() for operation in schema.get_all_operations() if operation.ok().path in PATHS]
    assert len(operations) == len(PATHS)
    for operation in operations:
        for mode in GenerationMode:

            @settings(max_examples=20, database=None, suppress_health_check=list(HealthCheck))
            @given(case=operation.as_strategy(generation_mode=mode))
            def check(case: Any) -> None:
                case.validate_response(case.call(headers=headers), checks=CHECKS)

            check()
