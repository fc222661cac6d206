"""generate and stream: greedy and sampled text, one adapter per prompt, and invalid arguments."""

import threading
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import replace
from pathlib import Path
from shutil import rmtree
from typing import Any

import pytest
import torch
from tests.own_tokenizers import PLAIN, SHOUTING, with_other_ids
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GenerationConfig,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from loradeck import Bank, LoraConfig
from loradeck.base.load import Base
from loradeck.base.text import decode, encode, pad_left
from loradeck.errors import AdapterError, ConfigError, RequestError, RouteError, UnknownAdapterError
from loradeck.generation import generate, stream
from loradeck.lora.routing import weights_of

pytestmark = pytest.mark.slow

PROMPTS = ["a", "What is the capital of France?", "日本"]
SAMPLED: dict[str, Any] = {"temperature": 1.5, "top_p": 0.95, "seed": 7}


@pytest.fixture
def bank(base: Base) -> Iterator[Bank]:
    """Two adapters strong enough to change what is said."""
    bank = Bank(base.model)
    for name, seed in (("a", 1), ("b", 2)):
        bank.add(name, LoraConfig(r=4, target_modules="all-linear"))
        rng = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in bank.parameters(name):
                parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.3)
    yield bank
    bank.detach()


def greedy_by_hand(base: Base, prompt: str, count: int) -> str:
    ids = encode(base.tokenizer, prompt)
    answer: list[int] = []
    for _ in range(count):
        token = int(base.model(torch.tensor([ids + answer])).logits[0, -1].argmax())
        if token == base.tokenizer.eos_token_id:
            break
        answer.append(token)
    return decode(base.tokenizer, answer)


# ---- the base alone


def test_greedy_is_the_likeliest_token_each_time(base: Base) -> None:
    texts = generate(base, None, PROMPTS, max_new_tokens=12)
    assert texts == [greedy_by_hand(base, prompt, 12) for prompt in PROMPTS]
    assert len(set(texts)) == 3


def test_messages(base: Base) -> None:
    messages = [{"role": "system", "content": "x"}, {"role": "user", "content": "a"}]
    assert generate(base, None, [messages, [messages[1]]], max_new_tokens=8)[1:] == generate(
        base, None, ["a"], max_new_tokens=8
    )


@pytest.mark.parametrize("options", [{}, SAMPLED])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_stream_is_generate_in_pieces(base: Base, prompt: str, options: dict[str, Any]) -> None:
    pieces = list(stream(base, None, prompt, max_new_tokens=24, **options))
    assert len(pieces) > 1
    assert "".join(pieces) == generate(base, None, [prompt], max_new_tokens=24, **options)[0]


def test_an_answer_ends_with_its_turn(base: Base) -> None:
    (full,) = generate(base, None, ["a"], max_new_tokens=12)
    stop = next(letter for letter in full[2:] if letter.isascii())
    (base.model.generation_config.eos_token_id,) = base.tokenizer(stop)["input_ids"]
    short, other = generate(base, None, ["a", PROMPTS[1]], max_new_tokens=12)
    assert short == full[: full.index(stop)]
    assert other == generate(base, None, [PROMPTS[1]], max_new_tokens=12)[0]
    assert "".join(stream(base, None, "a", max_new_tokens=12)) == short


def test_an_answer_ends_at_the_context(base: Base) -> None:
    prompt = "x" * (256 - len(encode(base.tokenizer, "")) - 3)
    assert len(encode(base.tokenizer, prompt)) == 253
    assert generate(base, None, [prompt], max_new_tokens=50) == [greedy_by_hand(base, prompt, 3)]


def test_the_bases_own_settings_do_not_count(base: Base, capfd: pytest.CaptureFixture[str]) -> None:
    options: tuple[dict[str, Any], ...] = ({}, SAMPLED)
    expected = [generate(base, None, PROMPTS, max_new_tokens=8, **each) for each in options]
    base.model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.1, top_k=2, top_p=0.5, repetition_penalty=3.0
    )
    assert [generate(base, None, PROMPTS, max_new_tokens=8, **each) for each in options] == expected
    assert capfd.readouterr() == ("", "")


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "no position_ids": lambda: BloomForCausalLM(BloomConfig(vocab_size=260, hidden_size=32, n_layer=2, n_head=2)),
    "state space": lambda: MambaForCausalLM(
        MambaConfig(vocab_size=260, hidden_size=32, num_hidden_layers=2, state_size=4)
    ),
    "no cache": lambda: OpenAIGPTLMHeadModel(
        OpenAIGPTConfig(vocab_size=260, n_embd=32, n_layer=2, n_head=2, n_positions=256)
    ),
    "sliding window": lambda: MistralForCausalLM(
        MistralConfig(
            vocab_size=260,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            sliding_window=8,
            initializer_range=0.2,
        )
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_any_model_generates_what_transformers_does(kind: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MODELS[kind]().eval()
    base = Base(model, tiny_tokenizer, kind, kind, "")
    rows = [encode(tiny_tokenizer, prompt) for prompt in PROMPTS]
    ids, mask = pad_left(rows, 0)
    settings = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=2, pad_token_id=0)
    output = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
    answers = [row[: row.index(2)] if 2 in row else row for row in output[:, ids.shape[1] :].tolist()]
    assert generate(base, None, PROMPTS, max_new_tokens=12) == [decode(tiny_tokenizer, answer) for answer in answers]


def test_nan_is_an_error(base: Base, bank: Bank) -> None:
    with pytest.raises(RequestError, match="NaN or Inf"):
        generate(base, bank, ["a"], {"a": 1e38}, max_new_tokens=4)


# ---- sampling


def test_a_seed_repeats_itself(base: Base) -> None:
    def sample(seed: int | None) -> list[str]:
        return generate(base, None, PROMPTS, max_new_tokens=12, temperature=1.0, seed=seed)

    assert sample(1) == sample(1) != sample(2)
    assert sample(None) != sample(None)


def test_each_prompt_draws_from_a_seed_of_its_own(base: Base) -> None:
    together = generate(base, None, ["a"] * 3, max_new_tokens=12, temperature=1.5, seed=7)
    assert len(set(together)) == 3
    for i, text in enumerate(together):
        assert generate(base, None, ["a"], max_new_tokens=12, temperature=1.5, seed=7 + i) == [text]


def test_a_seed_leaves_torchs_generator_alone(base: Base) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3).tolist()
    torch.manual_seed(0)
    generate(base, None, ["a"], max_new_tokens=4, temperature=1.0, seed=5)
    drawn = []
    for _ in stream(base, None, "a", max_new_tokens=3, temperature=1.0, seed=5):
        drawn = drawn or torch.rand(3).tolist()
    assert drawn == expected


def test_a_tiny_top_p_is_greedy(base: Base) -> None:
    greedy = generate(base, None, PROMPTS, max_new_tokens=12)
    assert generate(base, None, PROMPTS, max_new_tokens=12, temperature=2.0, top_p=1e-6) == greedy
    assert generate(base, None, PROMPTS, max_new_tokens=12, temperature=2.0, seed=0) != greedy


# ---- adapters


def test_each_prompt_goes_through_its_own_adapter(base: Base, bank: Bank) -> None:
    entries = [None, "a", "b", {"a": 0.5, "b": 0.5}]
    alone = [generate(base, bank, ["What?"], entry, max_new_tokens=8)[0] for entry in entries]
    assert len(set(alone)) == 4
    assert generate(base, bank, ["What?"] * 4, entries, max_new_tokens=8) == alone


def test_one_entry_is_for_all(base: Base, bank: Bank) -> None:
    for entry in (None, "a", {"a": 0.5, "b": 0.5}):
        assert generate(base, bank, PROMPTS, entry, max_new_tokens=8) == generate(
            base, bank, PROMPTS, [entry] * 3, max_new_tokens=8
        )


def test_none_is_the_base(base: Base, bank: Bank) -> None:
    with bank.route("a"):  # an outer route does not count
        through_bank = generate(base, bank, PROMPTS, max_new_tokens=8)
    bank.detach()
    assert through_bank == generate(base, None, PROMPTS, max_new_tokens=8)


@pytest.mark.parametrize("options", [{}, SAMPLED])
@pytest.mark.parametrize("entry", [None, "a", {"a": 0.5, "b": 0.5}])
def test_stream_through_an_adapter(base: Base, bank: Bank, entry: Any, options: dict[str, Any]) -> None:
    text = "".join(stream(base, bank, "What?", entry, max_new_tokens=12, **options))
    assert text == generate(base, bank, ["What?"], entry, max_new_tokens=12, **options)[0]


def test_a_stream_leaves_no_route_with_its_reader(base: Base, bank: Bank) -> None:
    ids = torch.tensor([[1, 50, 60]])
    plain = base.model(ids).logits
    pieces = stream(base, bank, "What?", "a", max_new_tokens=12)
    next(pieces)
    assert torch.equal(base.model(ids).logits, plain)
    assert torch.is_grad_enabled()
    interleaved = zip(pieces, stream(base, bank, "What?", "b", max_new_tokens=12), strict=False)
    second = "".join(b for _, b in interleaved)
    assert generate(base, bank, ["What?"], "b", max_new_tokens=12)[0].startswith(second)


def test_a_stream_that_nobody_reads_stops(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 0
    forward = base.model.forward

    def counted(*given: Any, **options: Any) -> Any:
        nonlocal steps
        assert not torch.is_grad_enabled()
        steps += 1
        return forward(*given, **options)

    monkeypatch.setattr(base.model, "forward", counted)
    threads = threading.active_count()
    pieces = stream(base, None, "a", max_new_tokens=200)
    next(pieces)
    pieces.close()
    assert 1 <= steps <= 4  # a character has at most four tokens here
    assert threading.active_count() == threads


# ---- what is refused


@pytest.mark.parametrize("prompts", [[], "a prompt", ()])
def test_refuses_prompts(base: Base, prompts: Any) -> None:
    with pytest.raises(ConfigError, match=r"Give a list: \[prompt\]"):
        generate(base, None, prompts)


@pytest.mark.parametrize("adapters", [[], ["a"], ["a", "b", None, None]])
def test_refuses_as_many_adapters_as_there_are_not_prompts(base: Base, bank: Bank, adapters: list[Any]) -> None:
    with pytest.raises(RouteError, match=f"the numbers of adapters and prompts differ: {len(adapters)} and 3"):
        generate(base, bank, PROMPTS, adapters)


def test_refuses_an_adapter_without_a_bank(base: Base) -> None:
    for attempt in (
        lambda: generate(base, None, PROMPTS, "a"),
        lambda: generate(base, None, PROMPTS, [None, "a", None]),
        lambda: stream(base, None, "a", {"a": 1.0}),
    ):
        with pytest.raises(RouteError, match="no bank"):
            attempt()


def test_refuses_an_unknown_adapter(base: Base, bank: Bank) -> None:
    with pytest.raises(UnknownAdapterError, match="nobody"):
        generate(base, bank, PROMPTS, ["a", "nobody", None])
    with pytest.raises(UnknownAdapterError, match="nobody"):
        stream(base, bank, "a", "nobody")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.1}, "top_p=1.1"),
    ],
)
def test_refuses_numbers(base: Base, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        generate(base, None, ["a"], **options)
    with pytest.raises(ConfigError, match=words):
        stream(base, None, "a", **options)


def test_refuses_a_prompt_longer_than_the_context(base: Base) -> None:
    with pytest.raises(ConfigError, match=r"leaves no room in the context of tiny, 256 tokens"):
        generate(base, None, ["a", "x" * 300])
    with pytest.raises(ConfigError, match="leaves no room"):
        stream(base, None, "x" * 300)


# ---- an adapter's own tokenizer


@pytest.mark.parametrize("options", [{}, SAMPLED])
def test_rows_of_a_batch_have_their_adapters_tokenizers(
    base: Base, bank: Bank, tmp_path: Path, options: dict[str, Any]
) -> None:
    """Each answer is that of a base with that tokenizer; adapters of this process have the base's."""
    loud = with_other_ids(base.tokenizer, eos_token="<|endoftext|>", chat_template=SHOUTING)
    loud.save_pretrained(bank.save("a", tmp_path / "loud"))
    (bank.save("b", tmp_path / "plain") / "chat_template.jinja").write_text(PLAIN)
    bank.load(tmp_path / "loud")
    bank.load(tmp_path / "plain", trainable=True)
    plain = copy(base.tokenizer)
    plain.chat_template = PLAIN
    question = [{"role": "user", "content": "hé"}]
    entries = [None, "loud", "plain", "a", {"loud": 0.5, "plain": 0.5}]
    own = [base.tokenizer, loud, plain, base.tokenizer, base.tokenizer]
    answers = generate(base, bank, [question] * 5, entries, max_new_tokens=12, **options)
    for index, (entry, tokenizer) in enumerate(zip(entries, own, strict=True)):
        alone = replace(base, tokenizer=tokenizer)
        names = {"loud": "a", "plain": "b"}  # the same tensors, without files
        weights = {names.get(name, name): weight for name, weight in weights_of(entry)}
        how = {**options, "seed": options["seed"] + index} if options else {}
        expected = generate(alone, bank, [question], weights or None, max_new_tokens=12, **how)
        assert answers[index : index + 1] == expected
        assert "".join(stream(base, bank, question, entry, max_new_tokens=12, **how)) == answers[index]
    assert answers[1] != answers[3]
    assert answers[2] != generate(base, bank, [question], "b", max_new_tokens=12)[0]


def test_a_tokenizer_that_cannot_be_used_is_refused_before_anything_is_computed(
    base: Base, bank: Bank, tmp_path: Path
) -> None:
    (bank.save("a", tmp_path / "poet") / "tokenizer.json").write_text("{")
    bank.load(tmp_path / "poet")
    for call in (lambda: generate(base, bank, ["x", "x"], [None, "poet"]), lambda: stream(base, bank, "x", "poet")):
        with pytest.raises(AdapterError, match=r"poet/tokenizer.json is not a JSON object"):
            call()
    assert generate(base, bank, ["x"], max_new_tokens=2)


def test_an_adapter_with_none_needs_its_folder_no_more(base: Base, bank: Bank, tmp_path: Path) -> None:
    folder = bank.save("a", tmp_path / "poet")
    bank.load(folder)
    rmtree(folder)
    assert generate(base, bank, ["x"], "poet", max_new_tokens=4) == generate(base, bank, ["x"], "a", max_new_tokens=4)


# ---- the real base


@pytest.mark.real
def test_real_base_answers(smollm2: Base) -> None:
    question = "What is the capital of France?"
    answer, _ = generate(smollm2, None, [question, "Name a sea and nothing else."], max_new_tokens=10)
    assert answer == "The capital of France is Paris."
    assert "".join(stream(smollm2, None, question, max_new_tokens=10)) == answer


@pytest.mark.real
def test_real_base_with_an_adapter_in_the_batch(smollm2: Base) -> None:
    bank = Bank(smollm2.model)
    try:
        bank.add("noise", LoraConfig(r=8, target_modules="all-linear"))
        with torch.no_grad():
            rng = torch.Generator().manual_seed(0)
            for parameter in bank.parameters("noise"):
                parameter.normal_(std=0.5, generator=rng)
        question = "What is the capital of France?"
        first, noise, last = generate(smollm2, bank, [question] * 3, [None, "noise", None], max_new_tokens=10)
        assert first == last == "The capital of France is Paris."
        assert noise != first
    finally:
        bank.detach()
