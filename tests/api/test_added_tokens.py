"""Adapters whose tokenizers have tokens that the base has not, over HTTP and in one batch with others."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import peft
import pytest
from tests.resized import BLUE, GREEN, ROWS, adapted, greedy, save, save_base, say, with_tokens
from transformers import PreTrainedTokenizerFast

from loradeck import AdapterStore, Base
from loradeck.api.metrics import Metrics
from loradeck.serve.config import EngineConfig
from loradeck.serve.engine import Engine

from .conftest import LocalServer, StepGate, random_adapter, until

pytestmark = [
    pytest.mark.slow,
    # PEFT asks for an attribute of transformers by its old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
PROMPT = "a <green>b"
COUNT = 12


@pytest.fixture
def source(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    return save_base(tmp_path / "base", "llama", tied=True, tokenizer=tiny_tokenizer)


@pytest.fixture
def base(source: Path) -> Base:
    return Base.load(source, dtype="float32", device="cpu")


@pytest.fixture
def tokenizer(tiny_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    return with_tokens(tiny_tokenizer)


@pytest.fixture
def theirs(source: Path, tokenizer: PreTrainedTokenizerFast) -> peft.PeftModel:
    model = adapted(source, "copies")
    say(model, tokenizer(PROMPT)["input_ids"], BLUE)
    return model


@pytest.fixture
def store(tmp_path: Path, theirs: peft.PeftModel, tiny_tokenizer: PreTrainedTokenizerFast) -> AdapterStore:
    store = AdapterStore(tmp_path / "store")
    store.publish("colours", save(theirs, tmp_path / "colours", tiny_tokenizer))
    store.publish("poet", random_adapter(3))
    return store


@pytest.fixture(params=[False, True], ids=["compiled step", "modules"])
def engine(
    request: pytest.FixtureRequest, base: Base, store: AdapterStore, metrics: Metrics, one_thread: None
) -> Iterator[Engine]:
    with Engine(base, store, EngineConfig(enforce_eager=request.param), observer=metrics) as engine:
        yield engine


def body(model: str, **fields: Any) -> dict[str, Any]:
    return {"model": model, "prompt": PROMPT, "max_tokens": COUNT, "temperature": 0, "logprobs": 3, **fields}


def choice(answer: httpx.Response) -> Any:
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def test_answers_are_those_of_the_resized_base_beside_others(
    server: LocalServer, theirs: peft.PeftModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    ids = tokenizer(PROMPT)["input_ids"]
    assert GREEN in ids
    expected = greedy(theirs, ids, COUNT)
    assert BLUE in expected
    models = ["colours", "poet", "base", "colours"]
    alone = {name: choice(server.request(TEXT, body(name))) for name in {*models}}
    # An answer that ends within a character is without its bytes; decode writes a replacement for them.
    assert alone["colours"]["text"] == tokenizer.decode(expected, skip_special_tokens=True).rstrip("\ufffd")
    assert "<blue>" in alone["colours"]["logprobs"]["tokens"]

    async def ask(client: httpx.AsyncClient) -> list[httpx.Response]:
        gate = StepGate(server.engine)
        asked = asyncio.gather(*(client.post(TEXT, json=body(name)) for name in models))
        await until(lambda: len(server.engine._loop.live) >= len(models))
        gate.open()
        return await asked

    for name, answer in zip(models, server.run(ask), strict=True):
        mixed = choice(answer)
        assert mixed["text"] == alone[name]["text"]
        assert mixed["logprobs"]["tokens"] == alone[name]["logprobs"]["tokens"]
        if name != "colours":
            shown = {token for top in mixed["logprobs"]["top_logprobs"] for token in top}
            assert not shown & {"<green>", "<blue>"}


def test_the_prefix_cache_keeps_added_tokens(server: LocalServer) -> None:
    prompt = "<green>" * 100
    first, second = (server.request(TEXT, body("colours", prompt=prompt)) for _ in range(2))
    assert choice(first)["text"] == choice(second)["text"]
    assert second.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_a_chat_has_them_in_its_messages_and_its_answer(server: LocalServer) -> None:
    question = {
        "model": "colours", "messages": [{"role": "user", "content": "<green>?"}], "max_tokens": 3, "temperature": 0,
        "logit_bias": {str(BLUE): 100},
    }  # fmt: skip
    assert choice(server.request(CHAT, question))["message"]["content"] == "<blue>" * 3
    events = server.events(CHAT, question)
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == "<blue>" * 3


@pytest.mark.parametrize("field", ["logit_bias", "stop_token_ids", "prompt"])
def test_an_id_is_known_to_the_rows_of_its_adapter_alone(server: LocalServer, field: str) -> None:
    value: Any = {"logit_bias": {str(GREEN): 1}, "stop_token_ids": [GREEN], "prompt": [5, GREEN]}[field]
    assert choice(server.request(TEXT, body("colours", **{field: value})))
    for model in ("poet", "base", "colours*0.5+poet*0.5"):
        answer = server.request(TEXT, body(model, **{field: value}))
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)
        assert f"unknown token id {GREEN}" in answer.json()["error"]["message"]
    beyond: Any = {"logit_bias": {str(ROWS + 2): 1}, "stop_token_ids": [ROWS + 2], "prompt": [5, ROWS + 2]}[field]
    answer = server.request(TEXT, body("colours", **{field: beyond}))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)


def test_a_stop_token_and_a_seed(server: LocalServer) -> None:
    answer = choice(server.request(TEXT, body("colours", stop_token_ids=[BLUE])))
    assert (answer["finish_reason"], "<blue>" in answer["text"]) == ("stop", False)
    hot = body("colours", temperature=1.5, seed=7, logit_bias={str(BLUE): 3})
    assert choice(server.request(TEXT, hot)) == choice(server.request(TEXT, hot))


def test_a_prompt_is_scored_by_their_own_rows(server: LocalServer) -> None:
    for model in ("colours", "poet"):
        answer = choice(server.request(TEXT, body(model, echo=True, max_tokens=0, logprobs=5)))
        assert len(answer["logprobs"]["tokens"]) == len(answer["logprobs"]["token_logprobs"])
        assert ("<green>" in answer["logprobs"]["tokens"]) == (model == "colours")


def test_a_blend_of_one_has_them_at_any_weight(server: LocalServer) -> None:
    answer = choice(server.request(TEXT, body("colours*0.5", logit_bias={str(GREEN): 100}, max_tokens=2)))
    assert answer["text"] == "<green><green>"


def test_a_tokenizer_without_its_rows_is_refused(
    server: LocalServer, store: AdapterStore, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Also where another adapter with the same tokenizer has them."""
    assert choice(server.request(TEXT, body("colours")))
    folder = random_adapter(5).save(tmp_path / "none")
    tokenizer.save_pretrained(folder)
    store.publish("none", folder)
    answer = server.request(TEXT, body("none"))
    assert answer.status_code == 422
    assert f"has the token '<blue>' with the id {BLUE}" in answer.json()["error"]["message"]


def test_many_of_them_share_a_small_budget(base: Base, store: AdapterStore, metrics: Metrics) -> None:
    """What counts are the rows beyond the base's, not the copies in the files."""
    colours = store.find("colours")
    config = EngineConfig(adapter_bytes=colours.facts.parameter_bytes + 2 * 2 * 64 * 4)
    assert config.adapter_bytes < colours.facts.nbytes / 2
    with Engine(base, store, config, observer=metrics) as engine:
        assert len(engine.generate([[5, GREEN]], "colours")[0])
        assert engine.adapter_cache.nbytes <= config.adapter_bytes
