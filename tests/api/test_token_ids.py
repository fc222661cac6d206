"""vLLM's `return_token_ids`: the ids of prompts and answers, which score the same tokens on another model."""

from typing import Any

import pytest

from .conftest import LocalServer

pytestmark = pytest.mark.slow

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
BODY: dict[str, Any] = {"model": "poet", "temperature": 0, "max_tokens": 6, "return_token_ids": True}
MESSAGES = {"messages": [{"role": "user", "content": "hi"}]}


def ids_of(server: LocalServer, text: str) -> list[int]:
    return list(server.engine.base.tokenizer(text, add_special_tokens=False)["input_ids"])


def test_a_chat_has_the_ids_of_its_prompt_and_of_each_answer(server: LocalServer) -> None:
    letters = {str(token): 100 for token in ids_of(server, "abcdefghijklmnopqrstuvwxyz")}  # each is a token
    body = {**BODY, **MESSAGES, "n": 2, "logprobs": True, "logit_bias": letters}
    completion = server.request(CHAT, body).json()
    assert completion["prompt_token_ids"] == server.request("/tokenize", {"model": "poet", **MESSAGES}).json()["tokens"]
    for choice in completion["choices"]:
        assert len(choice["token_ids"]) == len(choice["logprobs"]["content"]) == 6
        assert choice["token_ids"] == ids_of(server, choice["message"]["content"])


def test_a_stream_of_a_chat_has_the_ids_of_each_chunk(server: LocalServer) -> None:
    whole = server.request(CHAT, {**BODY, **MESSAGES}).json()
    first, *chunks, last = server.events(CHAT, {**BODY, **MESSAGES})
    assert first["prompt_token_ids"] == whole["prompt_token_ids"]
    assert all("prompt_token_ids" not in event for event in (*chunks, last))
    ids = [token for event in chunks for token in event["choices"][0]["token_ids"]]
    assert ids == whole["choices"][0]["token_ids"]


def test_completions_have_them_in_each_choice(server: LocalServer) -> None:
    body = {**BODY, "prompt": ["abc", "de"], "echo": True}
    whole = server.request(COMPLETIONS, body).json()
    assert [choice["prompt_token_ids"] for choice in whole["choices"]] == [ids_of(server, "abc"), ids_of(server, "de")]
    assert all(len(choice["token_ids"]) <= 6 for choice in whole["choices"])
    streamed: dict[int, list[int]] = {0: [], 1: []}
    prompts: dict[int, list[int]] = {}
    for event in server.events(COMPLETIONS, body):
        (choice,) = event["choices"]
        streamed[choice["index"]] += choice.get("token_ids", [])
        if "prompt_token_ids" in choice:
            prompts[choice["index"]] = choice["prompt_token_ids"]
    assert [streamed[0], streamed[1]] == [choice["token_ids"] for choice in whole["choices"]]
    assert [prompts[0], prompts[1]] == [choice["prompt_token_ids"] for choice in whole["choices"]]


def test_a_token_without_text_of_its_own_is_streamed_too(server: LocalServer) -> None:
    """One byte of a character comes with an empty text, and so does the token that ends the answer."""
    (end,) = server.engine.base.tokenizer("<|im_end|>", add_special_tokens=False)["input_ids"]
    body = {**BODY, "prompt": "a", "logit_bias": {str(end): 100}}
    events = server.events(COMPLETIONS, body)
    assert [token for event in events for token in event["choices"][0].get("token_ids", [])] == [end]
    assert events[-1]["choices"][0]["finish_reason"] == "stop"
    assert "".join(event["choices"][0]["text"] for event in events) == ""


def test_the_ids_score_the_same_answer_on_the_base(server: LocalServer) -> None:
    """As the page does to colour tokens by how far an adapter moved them."""
    answer = server.request(CHAT, {**BODY, **MESSAGES, "model": "tiny", "logprobs": True}).json()
    (choice,) = answer["choices"]
    prompt = [*answer["prompt_token_ids"], *choice["token_ids"]]
    scored = server.request(
        COMPLETIONS, {"model": "tiny", "prompt": prompt, "echo": True, "max_tokens": 0, "logprobs": 1}
    ).json()
    logprobs = scored["choices"][0]["logprobs"]["token_logprobs"][len(answer["prompt_token_ids"]) :]
    assert logprobs == pytest.approx([token["logprob"] for token in choice["logprobs"]["content"]], abs=1e-5)


@pytest.mark.parametrize("stream", [False, True])
def test_nobody_gets_them_unasked(server: LocalServer, stream: bool) -> None:
    for path, prompt in ((CHAT, MESSAGES), (COMPLETIONS, {"prompt": "abc"})):
        body = {**BODY, **prompt, "return_token_ids": False, "stream": stream}
        assert "token_ids" not in server.request(path, body).text
