"""Adapters with tokenizers and chat templates of their own, over HTTP, side by side in one batch."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.own_tokenizers import PLAIN, SHOUTING, with_other_ids
from transformers import PreTrainedTokenizerFast

from loradeck import AdapterStore, Base
from loradeck.api.auth import ApiKeys
from loradeck.api.metrics import Metrics
from loradeck.serve.config import EngineConfig
from loradeck.serve.engine import Engine

from .conftest import LocalServer, StepGate, random_adapter, until

pytestmark = pytest.mark.slow

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
QUESTION: dict[str, Any] = {
    "messages": [{"role": "user", "content": "hé"}],
    "temperature": 0,
    "max_tokens": 12,
    "logprobs": True,
    "top_logprobs": 2,
}
PROMPT: dict[str, Any] = {"prompt": "Once é", "temperature": 0, "max_tokens": 12, "logprobs": 2, "echo": True}


@pytest.fixture
def loud(tiny_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Other ids, another template, and another end."""
    return with_other_ids(tiny_tokenizer, eos_token="<|endoftext|>", chat_template=SHOUTING)


@pytest.fixture
def store(store: AdapterStore, loud: PreTrainedTokenizerFast, tmp_path: Path) -> AdapterStore:
    """Besides the others: `loud` with a tokenizer, `plain` with a template."""
    for seed, name in enumerate(("loud", "plain"), start=7):
        folder = random_adapter(seed).save(tmp_path / name)
        if name == "loud":
            loud.save_pretrained(folder)
        else:
            (folder / "chat_template.jinja").write_text(PLAIN)
        store.publish(name, folder)
    return store


@contextmanager
def server_of(base: Base, tokenizer: PreTrainedTokenizerFast, seed: int, folder: Path) -> Iterator[LocalServer]:
    """A server of one adapter, whose base has the tokenizer."""
    store = AdapterStore(folder)
    store.publish("alone", random_adapter(seed))
    metrics = Metrics("tiny")
    other = Base(base.model, tokenizer, base.name, base.source, base.fingerprint)
    with Engine(other, store, EngineConfig(), observer=metrics) as engine:
        yield LocalServer(engine, metrics)


def choices(answer: httpx.Response) -> Any:
    assert answer.status_code == 200, answer.text
    return [answer.json()["choices"], answer.json()["usage"]["prompt_tokens"]]


def test_rows_of_a_batch_have_their_adapters_tokenizers(
    server: LocalServer, base: Base, loud: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Text, tokens, log-probabilities and ends are those of a base with that tokenizer, and of the adapter alone."""
    plain = PreTrainedTokenizerFast(
        tokenizer_object=base.tokenizer.backend_tokenizer, eos_token="<|im_end|>", chat_template=PLAIN
    )
    biased = {**QUESTION, "logit_bias": {"0": 30}}  # the end of one of them alone
    requests = [(CHAT, QUESTION), (CHAT, biased), (CHAT, {**QUESTION, "stop": "<|endoftext|>"}), (TEXT, PROMPT)]
    expected = {}
    for seed, (name, tokenizer) in enumerate((("loud", loud), ("plain", plain)), start=7):
        with server_of(base, tokenizer, seed, tmp_path / f"store-{name}") as alone:
            for index, (path, body) in enumerate(requests):
                expected[name, index] = choices(alone.request(path, {**body, "model": "alone"}))
    assert expected["loud", 1][0][0]["finish_reason"] == "stop"
    assert expected["plain", 1][0][0]["finish_reason"] == "length"
    others = {
        index: choices(server.request(path, {**body, "model": "poet"})) for index, (path, body) in enumerate(requests)
    }

    async def ask(client: httpx.AsyncClient) -> list[httpx.Response]:
        gate = StepGate(server.engine)
        asked = [
            client.post(path, json={**body, "model": name})
            for path, body in requests
            for name in ("loud", "plain", "poet")
        ]
        answers = asyncio.gather(*asked)
        await until(lambda: len(server.engine._loop.live) >= len(asked))
        gate.open()
        return await answers

    answers = server.run(ask)
    for index in range(len(requests)):
        own, template, neither = answers[3 * index : 3 * index + 3]
        assert choices(own) == expected["loud", index]
        assert choices(template) == expected["plain", index]
        assert choices(neither) == others[index]
    streamed = server.events(CHAT, {**QUESTION, "model": "loud"})
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in streamed)
    assert text == expected["loud", 0][0][0]["message"]["content"]


def test_the_tokenizers_routes_name_a_model(server: LocalServer, loud: PreTrainedTokenizerFast, base: Base) -> None:
    for model, tokenizer in (("loud", loud), ("loud@1", loud), ("tiny", base.tokenizer), (None, base.tokenizer)):
        ids = tokenizer("hé")["input_ids"]
        assert server.request("/tokenize", {"prompt": "hé", "model": model}).json()["tokens"] == ids
        assert server.request("/detokenize", {"tokens": ids, "model": model}).json()["prompt"] == "hé"
        info = server.request("/tokenizer_info" + (f"?model={model}" if model else "")).json()
        assert (info["eos_token"], info["chat_template"]) == (tokenizer.eos_token, tokenizer.chat_template)
    messages = {"messages": QUESTION["messages"], "model": "plain", "add_generation_prompt": False}
    assert server.request("/tokenize", messages).json()["tokens"] == base.tokenizer("hé\n")["input_ids"]
    for path, body in (("/tokenize", {"prompt": "a", "model": "loudd"}), ("/tokenizer_info?model=loudd", None)):
        answer = server.request(path, body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (404, "model")
        assert "Did you mean loud?" in answer.json()["error"]["message"]


def test_a_key_sees_only_the_tokenizers_of_its_adapters(server: LocalServer, tmp_path: Path) -> None:
    (tmp_path / "keys.toml").write_text(
        "[alice]\n"
        'sha256 = "2bd806c97f0e00af1a1fc3328fa763a9269723c8db8fac4f93af71db186d6e90"\n'  # of alice
        'adapters = ["poet"]\n'
    )
    own = server.configured(keys=ApiKeys.load(tmp_path / "keys.toml"))
    assert own.request("/tokenizer_info?model=poet", key="alice").status_code == 200
    assert own.request("/tokenizer_info?model=loud", key="alice").status_code == 403
    assert own.request("/tokenize", {"prompt": "a", "model": "loud"}, key="alice").status_code == 403


def test_each_version_has_its_own(server: LocalServer, store: AdapterStore, tmp_path: Path) -> None:
    """Also where only the template differs: then the tensors, and their keys in every cache, are the same."""
    folder = tmp_path / "plain"
    body: dict[str, Any] = {"messages": QUESTION["messages"], "add_generation_prompt": False}
    lengths = []
    for number, template in enumerate((PLAIN, SHOUTING), start=1):
        (folder / "chat_template.jinja").write_text(template)
        load = {"lora_name": "again", "lora_path": str(folder), "load_inplace": True}
        assert server.request("/v1/load_lora_adapter", load).status_code == 200
        assert store.versions("again") == [*range(1, number + 1)]
        lengths.append(server.request("/tokenize", {**body, "model": "again"}).json()["count"])
    assert store.find("again@1").sha256() == store.find("again@2").sha256()
    assert lengths[0] != lengths[1]
    for number, length in enumerate(lengths, start=1):
        assert server.request("/tokenize", {**body, "model": f"again@{number}"}).json()["count"] == length
        usage = server.request(CHAT, {**QUESTION, "model": f"again@{number}"}).json()["usage"]
        assert usage["prompt_tokens"] == length
    assert server.request("/v1/load_lora_adapter", {**load, "load_inplace": False}).status_code == 400  # it is loaded


def test_a_tokenizer_that_cannot_be_used_is_refused_at_load(
    server: LocalServer, store: AdapterStore, tmp_path: Path
) -> None:
    folder = random_adapter(9).save(tmp_path / "broken")
    (folder / "chat_template.jinja").write_text("{% if %}")
    answer = server.request("/v1/load_lora_adapter", {"lora_name": "broken", "lora_path": str(folder)})
    assert answer.status_code == 422
    assert "chat_template.jinja, line 1" in answer.json()["error"]["message"]
    assert "broken" not in store.names()
    store.publish("broken", folder)
    answer = server.request(CHAT, {**QUESTION, "model": "broken"})
    assert answer.status_code == 422
    assert "chat_template.jinja, line 1" in answer.json()["error"]["message"]
    assert server.request(CHAT, {**QUESTION, "model": "poet"}).status_code == 200


def test_a_base_without_a_template_chats_through_an_adapter_that_has_one(
    base: Base, store: AdapterStore, metrics: Metrics
) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=base.tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    bare = Base(base.model, tokenizer, base.name, base.source, base.fingerprint)
    with Engine(bare, store, EngineConfig(), observer=metrics) as engine:
        server = LocalServer(engine, metrics)
        assert server.request(CHAT, {**QUESTION, "model": "plain"}).status_code == 200
        refused = server.request(CHAT, {**QUESTION, "model": "poet"})
        assert refused.status_code == 400
        assert "no chat template" in refused.json()["error"]["message"]


def test_a_blend_has_what_its_adapters_agree_on(server: LocalServer, store: AdapterStore, base: Base) -> None:
    store.publish("second", store.find("plain").path)
    body = {"messages": QUESTION["messages"]}
    agreed = server.request("/tokenize", {**body, "model": "plain*0.5+second*0.5"}).json()["tokens"]
    assert agreed == base.tokenizer("hé\n")["input_ids"]
    expected = server.request("/tokenize", {**body, "model": "tiny"}).json()["tokens"]
    for blend in ("plain*0.5+loud*0.5", "plain*0.5+poet*0.5"):
        assert server.request("/tokenize", {**body, "model": blend}).json()["tokens"] == expected
        assert server.request(CHAT, {**QUESTION, "model": blend}).json()["usage"]["prompt_tokens"] == len(expected)
