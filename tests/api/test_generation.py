"""Chat and completions through a real engine: their shapes, whole and streamed, and what they mean."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from loradeck import AdapterStore, Bank, Base, generate
from loradeck.api.config import ServerConfig
from loradeck.api.metrics import Metrics
from loradeck.serve.engine import Engine

from .conftest import Serve

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
SAY: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0, "max_tokens": 8}
GO_ON: dict[str, Any] = {"prompt": "Once", "temperature": 0, "max_tokens": 8}


def said(answer: Any) -> str:
    return str(answer["choices"][0].get("message", {}).get("content") or answer["choices"][0].get("text", ""))


def test_a_chat_answer(serve: Serve) -> None:
    answer = serve.ask(CHAT, {**SAY, "model": "poet"}).json()
    assert answer["id"].startswith("chatcmpl-")
    assert (answer["object"], answer["model"]) == ("chat.completion", "poet")
    assert answer["system_fingerprint"].startswith("fp_")
    (choice,) = answer["choices"]
    assert (choice["index"], choice["logprobs"], choice["message"]["role"]) == (0, None, "assistant")
    assert choice["finish_reason"] in ("stop", "length")
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}


@pytest.mark.parametrize(
    "model", [None, "", "tiny", "poet", "poet@1", "tiny:pirate", "poet*0.7+pirate*0.3", "poet*0.5"]
)
def test_every_name_answers_as_generate_does(serve: Serve, base: Base, store: AdapterStore, model: str | None) -> None:
    answer = said(serve.ask(CHAT, {**SAY, "model": model}).json())
    bank = Bank(base.model)
    parts = (model or "").removeprefix("tiny:").split("+")
    entry = {
        bank.load(store.find(name).path, name.replace("@", "-")): float(weight or 1)
        for name, _, weight in (part.partition("*") for part in parts)
        if name not in ("", "tiny")
    }
    with torch.inference_mode():
        expected = generate(base, bank, [[{"role": "user", "content": "hi"}]], entry or None, max_new_tokens=8)
    bank.detach()
    assert [answer] == expected


def test_the_adapters_differ(serve: Serve) -> None:
    answers = {name: said(serve.ask(CHAT, {**SAY, "model": name}).json()) for name in ("", "poet", "poet@1", "pirate")}
    assert len(set(answers.values())) == 4


def test_a_chat_stream_says_the_same(serve: Serve) -> None:
    whole = serve.ask(CHAT, SAY).json()
    first, *middle, last = serve.events(CHAT, SAY)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(event["choices"][0]["delta"]["content"] for event in middle) == said(whole)
    assert last["choices"][0]["delta"] == {}
    assert last["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    events = [first, *middle, last]
    assert len({(event["id"], event["created"], event["object"]) for event in events}) == 1
    assert first["object"] == "chat.completion.chunk"
    assert not any("usage" in event for event in events)


def test_a_stream_tells_its_usage_last(serve: Serve) -> None:
    for path, body in ((CHAT, SAY), (TEXT, GO_ON)):
        whole = serve.ask(path, body).json()
        *_, last = serve.events(path, {**body, "stream_options": {"include_usage": True}})
        assert last["choices"] == []
        for field in ("prompt_tokens", "completion_tokens"):
            assert last["usage"][field] == whole["usage"][field]


def test_several_answers_have_seeds_of_their_own(serve: Serve) -> None:
    hot = {**SAY, "temperature": 1.5, "seed": 7}
    answer = serve.ask(CHAT, {**hot, "n": 3}).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert len(set(texts)) == 3
    assert texts[1] == said(serve.ask(CHAT, {**hot, "seed": 8}).json())
    events = serve.events(CHAT, {**hot, "n": 3})
    streamed = [
        "".join(e["choices"][0]["delta"].get("content", "") for e in events if e["choices"][0]["index"] == index)
        for index in range(3)
    ]
    assert streamed == texts
    one = serve.ask(CHAT, hot).json()["usage"]
    assert answer["usage"]["prompt_tokens"] == one["prompt_tokens"]
    assert serve.ask(CHAT, {**hot, "n": 129}).json()["error"]["param"] == "n"


def test_stop_strings(serve: Serve) -> None:
    text = said(serve.ask(TEXT, GO_ON).json())
    assert len(text) > 4
    stop = text[2:4]
    before = text.partition(stop)[0]
    answer = serve.ask(TEXT, {**GO_ON, "stop": ["\0no", stop]}).json()
    assert (said(answer), answer["choices"][0]["finish_reason"]) == (before, "stop")
    events = serve.events(TEXT, {**GO_ON, "stop": stop})
    assert "".join(event["choices"][0]["text"] for event in events) == before


def test_chat_logprobs(serve: Serve) -> None:
    asked = {**SAY, "logprobs": True, "top_logprobs": 2}
    answer = serve.ask(CHAT, asked).json()
    content = answer["choices"][0]["logprobs"]["content"]
    assert len(content) == answer["usage"]["completion_tokens"]
    for token in content:
        assert token["logprob"] == max(top["logprob"] for top in token["top_logprobs"]) <= 0
        assert len(token["top_logprobs"]) == 2
    assert (
        bytes(byte for token in content for byte in token["bytes"])
        .decode(errors="replace")
        .startswith(said(answer)[:2])
    )
    streamed = [event["choices"][0]["logprobs"] for event in serve.events(CHAT, asked)]
    assert [token for told in streamed if told for token in told["content"]] == content
    assert serve.ask(CHAT, {**SAY, "top_logprobs": 2}).json()["error"]["param"] == "top_logprobs"


def test_completions_take_every_kind_of_prompt(serve: Serve) -> None:
    text = said(serve.ask(TEXT, GO_ON).json())
    ids = serve.ask("/tokenize", {"prompt": "Once"}).json()["tokens"]
    for prompt, count in ((["Once", "Once"], 2), (ids, 1), ([ids, ids, ids], 3)):
        answer = serve.ask(TEXT, {**GO_ON, "prompt": prompt}).json()
        assert [choice["text"] for choice in answer["choices"]] == [text] * count
        assert [choice["index"] for choice in answer["choices"]] == list(range(count))
        assert answer["usage"]["prompt_tokens"] == count * len(ids)
    assert len(serve.ask(TEXT, {"prompt": "Once", "temperature": 0, "ignore_eos": True}).json()["choices"]) == 1
    assert serve.ask(TEXT, {"prompt": "a", "ignore_eos": True}).json()["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize("prompt", ["Once", [10, 11, 12, 13]])
def test_echo_scores_a_prompt_as_lm_eval_asks(serve: Serve, base: Base, prompt: Any) -> None:
    ids = serve.ask("/tokenize", {"prompt": prompt}).json()["tokens"] if isinstance(prompt, str) else prompt
    asked = {"prompt": prompt, "echo": True, "max_tokens": 0, "logprobs": 1, "temperature": 0}
    answer = serve.ask(TEXT, asked).json()
    (choice,) = answer["choices"]
    told = choice["logprobs"]
    assert told["token_logprobs"][0] is None
    assert told["top_logprobs"][0] is None
    with torch.inference_mode():
        scores = base.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert told["token_logprobs"][1:] == pytest.approx(
        [scores[i, token].item() for i, token in enumerate(ids[1:])], abs=1e-4
    )
    assert [max(top.values()) for top in told["top_logprobs"][1:]] == pytest.approx(
        scores.max(-1).values[:-1].tolist(), abs=1e-4
    )
    assert "".join(told["tokens"]) == choice["text"] == base.tokenizer.decode(ids)
    assert told["text_offset"] == [0, 1, 2, 3]
    assert answer["usage"]["completion_tokens"] == 0
    assert choice["finish_reason"] == "length"


def test_echo_with_a_token_more(serve: Serve, base: Base) -> None:
    """lm-eval asks for one token and drops the last: there must be one, even where the answer would end at once."""
    for bias in ({}, {str(base.tokenizer.eos_token_id): 100}):
        asked = {**GO_ON, "echo": True, "max_tokens": 1, "logprobs": 1, "logit_bias": bias}
        choice = serve.ask(TEXT, asked).json()["choices"][0]
        assert len(choice["logprobs"]["token_logprobs"]) == len("Once") + 1
        assert choice["finish_reason"] == ("stop" if bias else "length")
        events = serve.events(TEXT, asked)
        assert "".join(event["choices"][0]["text"] for event in events) == choice["text"]
        offsets = [
            event["choices"][0]["logprobs"]["text_offset"] for event in events if event["choices"][0]["logprobs"]
        ]
        assert [place for own in offsets for place in own] == choice["logprobs"]["text_offset"] == [0, 1, 2, 3, 4]


def test_a_conversation_may_end_anywhere(serve: Serve) -> None:
    answer = serve.ask(CHAT, {**SAY, "max_tokens": None, "ignore_eos": True, "max_completion_tokens": 3}).json()
    assert answer["usage"]["completion_tokens"] == 3
    rest = serve.ask(CHAT, {**SAY, "max_tokens": None, "ignore_eos": True}).json()
    assert rest["usage"]["total_tokens"] == 256  # the base's context
    assert rest["choices"][0]["finish_reason"] == "length"
    assert (
        serve(config=ServerConfig(max_output=5))
        .ask(CHAT, {**SAY, "ignore_eos": True})
        .json()["usage"]["completion_tokens"]
        == 5
    )


def test_stop_tokens(serve: Serve) -> None:
    text = said(serve.ask(TEXT, GO_ON).json())
    ids = serve.ask("/tokenize", {"prompt": text}).json()["tokens"]
    answer = serve.ask(TEXT, {**GO_ON, "stop_token_ids": [ids[1]]}).json()
    assert (said(answer), answer["choices"][0]["finish_reason"]) == (text[: text.index(text[1])], "stop")
    assert answer["usage"]["completion_tokens"] == len(said(answer)) + 1


@pytest.fixture
def spaced(base: Base, spaced_tokenizer: PreTrainedTokenizerFast, metrics: Metrics) -> Iterator[Serve]:
    """An application whose tokenizer has words that begin with their space, and bytes for rare characters."""
    base.model.resize_token_embeddings(len(spaced_tokenizer), mean_resizing=False)
    with Engine(replace(base, tokenizer=spaced_tokenizer), observer=metrics) as engine:
        yield Serve(engine, metrics)


def test_words_go_on_with_their_space(spaced: Serve, spaced_tokenizer: PreTrainedTokenizerFast) -> None:
    word = spaced_tokenizer.convert_tokens_to_ids("▁b")
    asked = {"prompt": "a", "max_tokens": 2, "logit_bias": {word: 100}, "logprobs": 1, "echo": True, "temperature": 0}
    (choice,) = spaced.ask(TEXT, asked).json()["choices"]
    assert choice["text"] == "a b b"
    assert choice["logprobs"]["tokens"] == [" a", " b", " b"]
    assert choice["logprobs"]["text_offset"] == [0, 1, 3]
    events = spaced.events(TEXT, {**asked, "echo": False})
    assert "".join(event["choices"][0]["text"] for event in events) == " b b"
    (choice,) = spaced.ask(TEXT, {**asked, "prompt": [1, word], "stop": " b b"}).json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("<s> b", "stop")


def test_a_character_comes_whole_though_its_tokens_do_not(spaced: Serve) -> None:
    first, *rest = (3 + byte for byte in "語".encode())
    asked = {"prompt": "a", "max_tokens": 1, "logit_bias": {first: 100}, "logprobs": 2, "temperature": 0}
    (choice,) = spaced.ask(TEXT, asked).json()["choices"]
    assert (choice["text"], choice["logprobs"]["tokens"]) == ("", ["bytes:\\xe8"])
    prompt = [*spaced.ask("/tokenize", {"prompt": "a"}).json()["tokens"], first, rest[0]]
    asked = {**asked, "prompt": prompt, "logit_bias": {rest[1]: 100}}
    (choice,) = spaced.ask(TEXT, asked).json()["choices"]
    assert (choice["text"], choice["logprobs"]["text_offset"]) == ("語", [0])
