"""generate on a base in blocks says what it says on the plain base, whatever becomes of the base and its adapters."""

from collections.abc import Callable

import pytest
import torch
from tests.tiny_models import adapter

from loradeck import Bank, Base
from loradeck.base.weights import prepare
from loradeck.generation import generate, stream
from loradeck.native import step
from loradeck.runner import native_batch
from loradeck.runner.native_batch import native_model

PROMPTS = ["a", "What is the capital of France?", "b" * 90]


@pytest.fixture(params=["llama", "mixtral"])
def pair(make: Callable[[str], Base], request: pytest.FixtureRequest) -> list[tuple[Base, Bank]]:
    """The same base with the same two adapters: plain, and in blocks."""
    bases = [make(request.param), make(request.param)]
    prepare(bases[1].model, "blocks")
    banks = [Bank(base.model) for base in bases]
    for bank in banks:
        bank.add("a0", adapter(make(request.param).model, 0, 4))
        bank.add("a1", adapter(make(request.param).model, 1, 6))
    return [*zip(bases, banks, strict=True)]


def answers(pair: list[tuple[Base, Bank]], adapters: object, **options: object) -> list[list[str]]:
    return [
        generate(base, bank, PROMPTS, adapters, max_new_tokens=40, **options)  # type: ignore[arg-type]
        for base, bank in pair
    ]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of each compiled step."""
    counts: list[int] = []
    run = step.run

    def counted(model, chunks, threads) -> torch.Tensor:
        counts.append(len(chunks))
        return run(model, chunks, threads)

    monkeypatch.setattr(step, "run", counted)
    return counts


@pytest.mark.parametrize("adapters", [None, "a0", {"a0": 0.5, "a1": -1.0}, ["a1", None, {"a0": 2.0}]], ids=str)
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3}], ids=["greedy", "sampled"])
def test_the_same_is_said(
    pair: list[tuple[Base, Bank]], steps: list[int], adapters: object, options: dict[str, object]
) -> None:
    plain, blocks = answers(pair, adapters, **options)
    assert blocks == plain
    assert len(steps) > 1
    base, bank = pair[1]
    entry = adapters[0] if isinstance(adapters, list) else adapters
    assert "".join(stream(base, bank, PROMPTS[0], entry, max_new_tokens=40, **options)) == plain[0]  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, {"temperature": 0.3, "seed": 3}], ids=["greedy", "sampled"])
def test_what_repeats_itself_takes_fewer_steps(
    pair: list[tuple[Base, Bank]], steps: list[int], monkeypatch: pytest.MonkeyPatch, options: dict[str, object]
) -> None:
    """The answers are those of single steps, of rows together and of one as a stream."""
    base, bank = pair[1]
    texts, adapters = ["ab" * 20, "What?", "c" * 30], ["a0", None, {"a0": 0.5, "a1": -1.0}]

    def ask() -> list[str]:
        steps.clear()
        return generate(base, bank, texts, adapters, max_new_tokens=150, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(native_batch, "MAX_DRAFTS", 0)
        single = ask()
        count = len(steps)
    assert ask() == single
    assert len(steps) < count
    steps.clear()
    pieces = stream(base, bank, texts[0], adapters[0], max_new_tokens=150, **options)  # type: ignore[arg-type]
    assert "".join(pieces) == single[0]


def test_an_adapter_that_is_written_to_speaks_anew(pair: list[tuple[Base, Bank]]) -> None:
    before = answers(pair, "a0")
    for _, bank in pair:
        for parameter in bank["a0"].parameters():
            parameter.data.mul_(-2)
    after = answers(pair, "a0")
    assert after[0] == after[1] != before[1]


def test_a_merge_and_its_end_are_seen(pair: list[tuple[Base, Bank]], steps: list[int]) -> None:
    before = answers(pair, None)
    for _, bank in pair:
        bank.merge("a0")
    merged = answers(pair, None)
    for _, bank in pair:
        bank.unmerge()
    assert merged[0] == merged[1] != before[1]
    assert answers(pair, None) == before


def test_inside_a_route_the_modules_compute(pair: list[tuple[Base, Bank]], steps: list[int]) -> None:
    _, blocks = answers(pair, "a0")
    steps.clear()
    base, bank = pair[1]
    with bank.route("a0"):
        assert generate(base, None, PROMPTS, max_new_tokens=40) == blocks
    assert not steps


def test_an_adapter_of_another_module_is_computed_by_the_modules(pair: list[tuple[Base, Bank]], make, steps) -> None:
    for _, bank in pair:
        bank.add("head", adapter(make("llama").model, 2, 3, ["lm_head"]))
    answers(pair, None)
    steps.clear()
    plain, blocks = answers(pair, ["head", None, "a0"])
    assert blocks == plain
    assert not steps


def test_an_adapter_of_another_module_is_named_once(pair, make, caplog: pytest.LogCaptureFixture) -> None:
    for base, bank in pair:  # of the plain one, nobody takes it to be computed by the step
        bank.add("head", adapter(make("llama").model, 2, 3, ["lm_head"]))
        for _ in range(2):
            generate(base, bank, PROMPTS, ["head", "a0", "head"], max_new_tokens=2)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "answers with head are computed by transformers' modules: it adapts lm_head")
    ]


def test_why_the_modules_compute_a_base_in_blocks_is_said_once(make, caplog: pytest.LogCaptureFixture) -> None:
    base = make("llama")
    prepare(base.model, "blocks")
    base.model.model.layers[0].register_forward_pre_hook(lambda *_: None)
    for _ in range(2):
        generate(base, None, PROMPTS, max_new_tokens=2)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "LlamaForCausalLM is computed by transformers' modules: its `model.layers.0` has a hook")
    ]


def test_a_model_is_packed_once(pair: list[tuple[Base, Bank]]) -> None:
    plain, blocks = (base.model for base, _ in pair)
    assert native_model(plain) is None
    native = native_model(blocks)
    assert native is not None
    assert native_model(blocks) is native
