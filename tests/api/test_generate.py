"""Chat completions and completions on an engine: their JSON, whole and streamed, and what the fields do."""

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from loradeck import AdapterStore, Bank, Base, generate
from loradeck.api.config import ServerConfig
from loradeck.api.generate import sampling_params
from loradeck.api.metrics import Metrics
from loradeck.api.requests import GenerationRequest
from loradeck.base.text import decode
from loradeck.base.weights import Weights
from loradeck.sampling import SamplingParams
from loradeck.serve.engine import Engine

from .conftest import LocalServer

pytestmark = pytest.mark.slow

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
CHAT_REQUEST: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0, "max_tokens": 8}
TEXT_REQUEST: dict[str, Any] = {"prompt": "Once", "temperature": 0, "max_tokens": 8}


def text_of(completion: Any) -> str:
    (choice, *_) = completion["choices"]
    return str(choice["message"]["content"] if "message" in choice else choice["text"])


def test_sampling_params_of_a_request() -> None:
    defaults = sampling_params(GenerationRequest(), 5, None)
    assert defaults == SamplingParams(max_tokens=5, temperature=1.0)
    fields: dict[str, Any] = {
        "min_tokens": 2,
        "temperature": 0.0,
        "top_p": 0.5,
        "min_p": 0.25,
        "presence_penalty": 1.5,
        "frequency_penalty": -1.5,
        "repetition_penalty": 1.25,
        "logit_bias": {3: -1.0},
        "seed": 0,
        "stop": ["a", "b"],
        "ignore_eos": True,
    }
    request = GenerationRequest(**fields, top_k=-1, stop_token_ids=[7])
    expected = SamplingParams(max_tokens=5, stop_token_ids=frozenset({7}), logprobs=1, prompt_logprobs=2, **fields)
    assert sampling_params(request, 5, 1, 2) == expected
    assert sampling_params(GenerationRequest(top_k=3, stop="a"), 5, None).top_k == 3


def test_a_chat_completion(server: LocalServer) -> None:
    completion = server.request(CHAT, {**CHAT_REQUEST, "model": "poet"}).json()
    assert completion["id"].startswith("chatcmpl-")
    assert (completion["object"], completion["model"]) == ("chat.completion", "poet")
    assert completion["system_fingerprint"].startswith("fp_")
    (choice,) = completion["choices"]
    assert (choice["index"], choice["logprobs"], choice["message"]["role"]) == (0, None, "assistant")
    assert choice["finish_reason"] in ("stop", "length")
    usage = completion["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}


@pytest.mark.parametrize(
    "model", [None, "", "tiny", "poet", "poet@1", "tiny:pirate", "poet*0.7+pirate*0.3", "poet*0.5"]
)
def test_every_model_name_answers_as_generate_does(
    server: LocalServer, base: Base, store: AdapterStore, model: str | None
) -> None:
    answer = text_of(server.request(CHAT, {**CHAT_REQUEST, "model": model}).json())
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


@pytest.mark.parametrize("weights", ["plain", "packed", "blocks"])
@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_of_the_head_answers_prompts_of_several_tokens(
    tiny: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, weights: Weights, tied: bool
) -> None:
    """The head sees only the tokens that are scored; beside it are rows of the base. PEFT is the oracle."""
    tiny.config.tie_word_embeddings = tied
    tiny.tie_weights()
    tiny.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    prompt = tiny_tokenizer("Once upon")["input_ids"]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, about tied weights
        torch.manual_seed(0)
        config = PeftConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
        peft = get_peft_model(tiny, config).eval()
        peft.save_pretrained(tmp_path / "head")
        out = peft.generate(
            input_ids=torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    expected = decode(tiny_tokenizer, out[0, len(prompt) :].tolist())
    store, metrics = AdapterStore(tmp_path / "store"), Metrics("tiny")
    store.publish("head", tmp_path / "head")
    loaded = Base.load(tmp_path / "base", dtype="float32", device="cpu", weights=weights)
    with Engine(loaded, store, observer=metrics) as engine:
        server = LocalServer(engine, metrics)
        body = {**TEXT_REQUEST, "prompt": ["Once upon", "Once"], "ignore_eos": True}
        for logprobs in (None, 1):
            choices = server.request(TEXT, {**body, "model": "head", "logprobs": logprobs}).json()["choices"]
            assert choices[0]["text"] == expected
            scored = server.request(TEXT, {**body, "model": "head", "echo": True, "logprobs": logprobs}).json()
            assert scored["choices"][0]["text"] == "Once upon" + expected
        assert server.request(TEXT, body).json()["choices"][0]["text"] != expected


def test_the_adapters_differ(server: LocalServer) -> None:
    answers = {
        name: text_of(server.request(CHAT, {**CHAT_REQUEST, "model": name}).json())
        for name in ("", "poet", "poet@1", "pirate")
    }
    assert len(set(answers.values())) == 4


def test_a_chat_stream_has_the_same_text(server: LocalServer) -> None:
    completion = server.request(CHAT, CHAT_REQUEST).json()
    first, *middle, last = server.events(CHAT, CHAT_REQUEST)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(event["choices"][0]["delta"]["content"] for event in middle) == text_of(completion)
    assert last["choices"][0]["delta"] == {}
    assert last["choices"][0]["finish_reason"] == completion["choices"][0]["finish_reason"]
    events = [first, *middle, last]
    assert len({(event["id"], event["created"], event["object"]) for event in events}) == 1
    assert first["object"] == "chat.completion.chunk"
    assert not any("usage" in event for event in events)


def test_the_usage_is_the_last_event_of_a_stream(server: LocalServer) -> None:
    for path, body in ((CHAT, CHAT_REQUEST), (TEXT, TEXT_REQUEST)):
        completion = server.request(path, body).json()
        *_, last = server.events(path, {**body, "stream_options": {"include_usage": True}})
        assert last["choices"] == []
        for field in ("prompt_tokens", "completion_tokens"):
            assert last["usage"][field] == completion["usage"][field]


def test_each_of_n_answers_has_its_own_seed(server: LocalServer) -> None:
    hot = {**CHAT_REQUEST, "temperature": 1.5, "seed": 7}
    completion = server.request(CHAT, {**hot, "n": 3}).json()
    assert [choice["index"] for choice in completion["choices"]] == [0, 1, 2]
    texts = [choice["message"]["content"] for choice in completion["choices"]]
    assert len(set(texts)) == 3
    assert texts[1] == text_of(server.request(CHAT, {**hot, "seed": 8}).json())
    events = server.events(CHAT, {**hot, "n": 3})
    streamed = [
        "".join(e["choices"][0]["delta"].get("content", "") for e in events if e["choices"][0]["index"] == index)
        for index in range(3)
    ]
    assert streamed == texts
    one = server.request(CHAT, hot).json()["usage"]
    assert completion["usage"]["prompt_tokens"] == one["prompt_tokens"]
    assert server.request(CHAT, {**hot, "n": 129}).json()["error"]["param"] == "n"


def test_stop_strings(server: LocalServer) -> None:
    text = text_of(server.request(TEXT, TEXT_REQUEST).json())
    assert len(text) > 4
    stop = text[2:4]
    before = text.partition(stop)[0]
    completion = server.request(TEXT, {**TEXT_REQUEST, "stop": ["\0no", stop]}).json()
    assert (text_of(completion), completion["choices"][0]["finish_reason"]) == (before, "stop")
    events = server.events(TEXT, {**TEXT_REQUEST, "stop": stop})
    assert "".join(event["choices"][0]["text"] for event in events) == before


def test_chat_logprobs(server: LocalServer) -> None:
    body = {**CHAT_REQUEST, "logprobs": True, "top_logprobs": 2}
    completion = server.request(CHAT, body).json()
    content = completion["choices"][0]["logprobs"]["content"]
    assert len(content) == completion["usage"]["completion_tokens"]
    for token in content:
        assert token["logprob"] == max(top["logprob"] for top in token["top_logprobs"]) <= 0
        assert len(token["top_logprobs"]) == 2
    raw = bytes(byte for token in content for byte in token["bytes"])
    assert raw.decode(errors="replace").startswith(text_of(completion)[:2])
    streamed = [event["choices"][0]["logprobs"] for event in server.events(CHAT, body)]
    assert [token for logprobs in streamed if logprobs for token in logprobs["content"]] == content
    assert server.request(CHAT, {**CHAT_REQUEST, "top_logprobs": 2}).json()["error"]["param"] == "top_logprobs"


def test_completions_take_texts_and_token_ids(server: LocalServer) -> None:
    text = text_of(server.request(TEXT, TEXT_REQUEST).json())
    ids = server.request("/tokenize", {"prompt": "Once"}).json()["tokens"]
    for prompt, count in ((["Once", "Once"], 2), (ids, 1), ([ids, ids, ids], 3)):
        completion = server.request(TEXT, {**TEXT_REQUEST, "prompt": prompt}).json()
        assert [choice["text"] for choice in completion["choices"]] == [text] * count
        assert [choice["index"] for choice in completion["choices"]] == list(range(count))
        assert completion["usage"]["prompt_tokens"] == count * len(ids)
    assert len(server.request(TEXT, {"prompt": "Once", "temperature": 0, "ignore_eos": True}).json()["choices"]) == 1
    assert server.request(TEXT, {"prompt": "a", "ignore_eos": True}).json()["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize("prompt", ["Once", [10, 11, 12, 13]])
def test_echo_scores_a_prompt(server: LocalServer, base: Base, prompt: Any) -> None:
    ids = server.request("/tokenize", {"prompt": prompt}).json()["tokens"] if isinstance(prompt, str) else prompt
    body = {"prompt": prompt, "echo": True, "max_tokens": 0, "logprobs": 1, "temperature": 0}
    completion = server.request(TEXT, body).json()
    (choice,) = completion["choices"]
    logprobs = choice["logprobs"]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    with torch.inference_mode():
        expected = base.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    of_tokens = [expected[i, token].item() for i, token in enumerate(ids[1:])]
    assert logprobs["token_logprobs"][1:] == pytest.approx(of_tokens, abs=1e-4)
    likeliest = [max(top.values()) for top in logprobs["top_logprobs"][1:]]
    assert likeliest == pytest.approx(expected.max(-1).values[:-1].tolist(), abs=1e-4)
    assert "".join(logprobs["tokens"]) == choice["text"] == base.tokenizer.decode(ids)
    assert logprobs["text_offset"] == [0, 1, 2, 3]
    assert completion["usage"]["completion_tokens"] == 0
    assert choice["finish_reason"] == "length"


def test_echo_with_one_more_token(server: LocalServer, base: Base) -> None:
    """lm-eval requests one token and drops it: there must be one, even if the answer ends at once."""
    for bias in ({}, {str(base.tokenizer.eos_token_id): 100}):
        body = {**TEXT_REQUEST, "echo": True, "max_tokens": 1, "logprobs": 1, "logit_bias": bias}
        choice = server.request(TEXT, body).json()["choices"][0]
        assert len(choice["logprobs"]["token_logprobs"]) == len("Once") + 1
        assert choice["finish_reason"] == ("stop" if bias else "length")
        events = server.events(TEXT, body)
        assert "".join(event["choices"][0]["text"] for event in events) == choice["text"]
        streamed = [event["choices"][0]["logprobs"] for event in events if event["choices"][0]["logprobs"]]
        offsets = [offset for logprobs in streamed for offset in logprobs["text_offset"]]
        assert offsets == choice["logprobs"]["text_offset"] == [0, 1, 2, 3, 4]


def test_the_length_of_an_answer(server: LocalServer) -> None:
    endless = {**CHAT_REQUEST, "max_tokens": None, "ignore_eos": True}
    short = server.request(CHAT, {**endless, "max_completion_tokens": 3}).json()
    assert short["usage"]["completion_tokens"] == 3
    longest = server.request(CHAT, endless).json()
    assert longest["usage"]["total_tokens"] == 256  # the base's context
    assert longest["choices"][0]["finish_reason"] == "length"
    limited = server.configured(config=ServerConfig(max_output=5)).request(CHAT, endless).json()
    assert limited["usage"]["completion_tokens"] == 5


def test_the_length_of_an_answer_that_names_none(server: LocalServer, base: Base) -> None:
    endless = {**CHAT_REQUEST, "max_tokens": None, "ignore_eos": True}
    configured = server.configured(config=ServerConfig(default_max_tokens=7))

    def length(where: LocalServer, **fields: Any) -> int:
        return int(where.request(CHAT, {**endless, **fields}).json()["usage"]["completion_tokens"])

    assert length(configured) == 7
    assert length(configured, max_tokens=9) == 9
    assert base.model.generation_config is not None
    base.model.generation_config.max_new_tokens = 11  # as a base's own generation_config.json may say
    assert length(server) == 11
    assert length(configured) == 7
    assert length(server, max_tokens=12) == 12
    texts = {"prompt": "a", "max_tokens": None, "ignore_eos": True}
    assert configured.request(TEXT, texts).json()["usage"]["completion_tokens"] == 16  # OpenAI's, for completions


def test_an_answer_cannot_need_more_tokens_than_it_may_have(server: LocalServer) -> None:
    context = 256
    prompt = server.request(CHAT, CHAT_REQUEST).json()["usage"]["prompt_tokens"]
    for path, body, most in (
        (CHAT, CHAT_REQUEST, 8),
        (TEXT, TEXT_REQUEST, 8),
        (TEXT, {"prompt": "a"}, 16),  # OpenAI's default
        (CHAT, {**CHAT_REQUEST, "max_tokens": 4000}, context - prompt),
    ):
        response = server.request(path, {**body, "min_tokens": 300})
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, "min_tokens")
        assert f"min_tokens is 300, and the answer may have at most {most} tokens" in error["message"]


def test_stop_strings_of_special_tokens(server: LocalServer, base: Base) -> None:
    start = base.tokenizer.bos_token_id
    forced = {"temperature": 0, "max_tokens": 4, "logit_bias": {str(start): 100}}
    stops = {"stop": "<|im_start|>"}, {"stop": ["\0no", "<|im_start|>"]}, {"stop_token_ids": [start]}
    for stop in (*stops, {"stop": "<|im_start|><|im_start|>"}):
        completion = server.request(TEXT, {"prompt": "a", **forced, **stop}).json()
        assert (text_of(completion), completion["choices"][0]["finish_reason"]) == ("", "stop")
        assert completion["usage"]["completion_tokens"] == (1 if stop in stops else 2)
        assert "".join(e["choices"][0]["text"] for e in server.events(TEXT, {"prompt": "a", **forced, **stop})) == ""


def test_many_stop_strings(server: LocalServer) -> None:
    text = text_of(server.request(TEXT, TEXT_REQUEST).json())
    stops = [f"\0{number}" for number in range(255)]
    completion = server.request(TEXT, {**TEXT_REQUEST, "stop": [*stops, text[3:5]]}).json()
    assert (text_of(completion), completion["choices"][0]["finish_reason"]) == (text.partition(text[3:5])[0], "stop")


def test_numbers_and_nulls_as_other_languages_write_them(server: LocalServer) -> None:
    expected = server.request(CHAT, CHAT_REQUEST).json()
    body = {
        **CHAT_REQUEST,
        "max_tokens": 8.0,
        "n": 1.0,
        "top_k": None,
        "stop": None,
        "stream_options": None,
        "seed": 3.0,
    }
    assert text_of(server.request(CHAT, body).json()) == text_of(expected)
    *_, last = server.events(CHAT, {**body, "stream_options": {"include_usage": None}})
    assert "usage" not in last


def test_a_developers_message_is_the_systems(server: LocalServer) -> None:
    def answer(*roles: str) -> Any:
        messages = [{"role": role, "content": "Rhyme."} for role in roles] + CHAT_REQUEST["messages"]
        completion = server.request(CHAT, {**CHAT_REQUEST, "messages": messages}).json()
        return text_of(completion), completion["usage"]["prompt_tokens"]

    assert answer("developer") == answer("system")


def test_a_large_bias(server: LocalServer) -> None:
    word = "b"
    number = server.request("/tokenize", {"prompt": word}).json()["tokens"][0]
    bias = {str(token): 100 if token == number else -100 for token in range(259)}
    completion = server.request(TEXT, {**TEXT_REQUEST, "logit_bias": bias, "n": 2}).json()
    assert [choice["text"] for choice in completion["choices"]] == [word * 8] * 2


def test_stop_tokens(server: LocalServer) -> None:
    text = text_of(server.request(TEXT, TEXT_REQUEST).json())
    ids = server.request("/tokenize", {"prompt": text}).json()["tokens"]
    completion = server.request(TEXT, {**TEXT_REQUEST, "stop_token_ids": [ids[1]]}).json()
    assert (text_of(completion), completion["choices"][0]["finish_reason"]) == (text[: text.index(text[1])], "stop")
    assert completion["usage"]["completion_tokens"] == len(text_of(completion)) + 1


@pytest.fixture
def spaced(base: Base, spaced_tokenizer: PreTrainedTokenizerFast, metrics: Metrics) -> Iterator[LocalServer]:
    """An application whose tokens are words with their leading space, and bytes for rare characters."""
    base.model.resize_token_embeddings(len(spaced_tokenizer), mean_resizing=False)
    with Engine(replace(base, tokenizer=spaced_tokenizer), observer=metrics) as engine:
        yield LocalServer(engine, metrics)


def test_words_keep_their_leading_space(spaced: LocalServer, spaced_tokenizer: PreTrainedTokenizerFast) -> None:
    word = spaced_tokenizer.convert_tokens_to_ids("▁b")
    body = {"prompt": "a", "max_tokens": 2, "logit_bias": {word: 100}, "logprobs": 1, "echo": True, "temperature": 0}
    (choice,) = spaced.request(TEXT, body).json()["choices"]
    assert choice["text"] == "a b b"
    assert choice["logprobs"]["tokens"] == [" a", " b", " b"]
    assert choice["logprobs"]["text_offset"] == [0, 1, 3]
    events = spaced.events(TEXT, {**body, "echo": False})
    assert "".join(event["choices"][0]["text"] for event in events) == " b b"
    (choice,) = spaced.request(TEXT, {**body, "prompt": [1, word], "stop": " b b"}).json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("<s> b", "stop")


def test_a_character_of_several_tokens_comes_with_the_last_one(spaced: LocalServer) -> None:
    first, *rest = (3 + byte for byte in "語".encode())
    body = {"prompt": "a", "max_tokens": 1, "logit_bias": {first: 100}, "logprobs": 2, "temperature": 0}
    (choice,) = spaced.request(TEXT, body).json()["choices"]
    assert (choice["text"], choice["logprobs"]["tokens"]) == ("", ["bytes:\\xe8"])
    prompt = [*spaced.request("/tokenize", {"prompt": "a"}).json()["tokens"], first, rest[0]]
    body = {**body, "prompt": prompt, "logit_bias": {rest[1]: 100}}
    (choice,) = spaced.request(TEXT, body).json()["choices"]
    assert (choice["text"], choice["logprobs"]["text_offset"]) == ("語", [0])
