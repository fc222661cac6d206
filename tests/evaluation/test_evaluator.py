"""The figures of an evaluation against training's own validation, PEFT, and each adapter evaluated alone."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy, logsigmoid

from loradeck import Bank, Base, evaluate, generate
from loradeck.dataset.example import Example, Preference
from loradeck.dataset.read import read_dataset
from loradeck.errors import ConfigError, DataError, RouteError, UnknownAdapterError
from loradeck.evaluation.config import EvalConfig
from loradeck.evaluation.question import questions_of
from loradeck.evaluation.report import AdapterReport, Report
from loradeck.lora.config import LoraConfig
from loradeck.train.config import TrainConfig
from loradeck.train.events import AnyEvent, Evaluation
from loradeck.train.trainer import Trainer

from .conftest import ADAPTERS, PAIRS, RECORDS

ROWS = {"poet": "poet", "pirate": "pirate", "both": {"poet": 0.7, "pirate": -0.3}}
LOSSES_ONLY = EvalConfig(samples=0)


@pytest.fixture
def examples(base: Base, write: Callable) -> list[Example]:
    return [*read_dataset(write(RECORDS), base.tokenizer, 256).train]


@pytest.fixture
def pairs(base: Base, write: Callable) -> list[Preference]:
    return [*read_dataset(write(PAIRS, "pairs.jsonl"), base.tokenizer, 256).train]


def row(report: Report, name: str) -> AdapterReport:
    (found,) = (each for each in report.adapters if each.adapter == name)
    return found


def validated(base: Base, bank: Bank, name: str, examples: list) -> Evaluation:
    """Training's own validation of an adapter that was not trained yet."""
    events: list[AnyEvent] = []
    trainer = Trainer(base, bank, on_event=events.append)
    job = trainer.add(name, examples, TrainConfig(), valid=examples)
    trainer.evaluate([job])
    (event,) = events
    assert isinstance(event, Evaluation)
    return event


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_loss_is_that_of_trainings_validation(base: Base, bank: Bank, examples: list, name: str) -> None:
    report = evaluate(base, bank, examples, [*ADAPTERS], LOSSES_ONLY)
    event = validated(base, bank, name, examples)
    assert row(report, name).loss == pytest.approx(event.loss, abs=1e-5)
    assert report.tokens == event.tokens
    assert row(report, name).perplexity == pytest.approx(math.exp(event.loss), rel=1e-5)
    assert abs(row(report, name).loss - row(report, "none").loss) > 1e-3


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_loss_is_pefts(base: Base, bank: Bank, examples: list, tmp_path: Path) -> None:
    report = evaluate(base, bank, examples, ["poet"], LOSSES_ONLY)
    bank.save("poet", tmp_path / "poet")
    bank.detach()

    @torch.no_grad()
    def loss(model: torch.nn.Module) -> float:
        total = 0.0
        for example in examples:
            logits = model(input_ids=torch.tensor([example.tokens])).logits[0, :-1]
            total += float(cross_entropy(logits, torch.tensor(example.labels[1:]), reduction="sum"))
        return total / sum(example.supervised for example in examples)

    assert row(report, "none").loss == pytest.approx(loss(base.model), abs=1e-5)
    peft = PeftModel.from_pretrained(base.model, tmp_path / "poet").eval()
    assert row(report, "poet").loss == pytest.approx(loss(peft), abs=1e-5)


@pytest.mark.parametrize("kind", ["examples", "pairs"])
@pytest.mark.parametrize("sizes", [{}, {"max_tokens": 1, "max_rows": 1}, {"max_tokens": 100, "max_rows": 7}])
def test_one_pass_is_each_alone(
    base: Base, bank: Bank, request: pytest.FixtureRequest, kind: str, sizes: dict[str, int]
) -> None:
    data = request.getfixturevalue(kind)
    config = EvalConfig(exact_match=True, pattern="[aeiou]", samples=9, max_new_tokens=6, **sizes)
    together = evaluate(base, bank, data, ROWS, config)
    assert [each.adapter for each in together.adapters] == ["none", *ROWS]
    for name, entry in ROWS.items():
        alone = evaluate(base, bank, data, {name: entry}, config)
        for field in ("loss", "perplexity", "exact_match", "pattern_rate", "accuracy", "margin"):
            expected = getattr(row(alone, name), field)
            assert getattr(row(together, name), field) == (expected and pytest.approx(expected, abs=1e-5, rel=1e-5))
        assert [each.answers[name] for each in together.samples] == [each.answers[name] for each in alone.samples]
    assert len({row(together, name).loss for name in ("none", *ROWS)}) == 1 + len(ROWS)


def test_without_packing_it_is_the_same(
    base: Base, bank: Bank, examples: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = evaluate(base, bank, examples, ROWS, LOSSES_ONLY)
    monkeypatch.setattr("loradeck.train.loss.can_pack", lambda model: False)
    padded = evaluate(base, bank, examples, ROWS, LOSSES_ONLY)
    for one, other in zip(packed.adapters, padded.adapters, strict=True):
        assert one.loss == pytest.approx(other.loss, abs=1e-5)


def test_an_adapter_on_the_head_is_evaluated_too(base: Base, bank: Bank, examples: list) -> None:
    before = evaluate(base, bank, examples, ["poet"], LOSSES_ONLY)
    bank.add("head", LoraConfig(r=2, target_modules=["lm_head"]))
    with torch.no_grad():
        for parameter in bank.parameters("head"):
            parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(5))
    after = evaluate(base, bank, examples, ["poet", "head"], LOSSES_ONLY)
    for name in ("none", "poet"):
        assert row(after, name).loss == pytest.approx(row(before, name).loss, abs=1e-5)
    event = validated(base, bank, "head", examples)
    assert row(after, "head").loss == pytest.approx(event.loss, abs=1e-5)
    assert abs(row(after, "head").loss - row(after, "none").loss) > 1e-3


def test_preference_pairs_have_the_quantities_of_dpo(base: Base, bank: Bank, pairs: list[Preference]) -> None:
    config = replace(LOSSES_ONLY, dpo_beta=0.3)
    report = evaluate(base, bank, pairs, ["poet"], config)

    def logp(example: Example, name: str | None) -> float:
        with torch.no_grad(), bank.route(name):
            logits = base.model(input_ids=torch.tensor([example.tokens])).logits[0, :-1]
        return -float(cross_entropy(logits, torch.tensor(example.labels[1:]), reduction="sum"))

    gain = {id(side): logp(side, "poet") - logp(side, None) for pair in pairs for side in (pair.chosen, pair.rejected)}
    margins = torch.tensor([0.3 * (gain[id(pair.chosen)] - gain[id(pair.rejected)]) for pair in pairs])
    poet = row(report, "poet")
    assert poet.margin == pytest.approx(float(margins.mean()), abs=1e-4)
    assert poet.accuracy == pytest.approx(float((margins > 0).float().mean()))
    assert poet.loss == pytest.approx(float(-logsigmoid(margins).mean()), abs=1e-4)
    assert poet.perplexity is None
    none = row(report, "none")
    assert (none.loss, none.accuracy, none.margin) == (pytest.approx(math.log(2)), None, None)


def test_answers_are_those_of_generate_and_counted(base: Base, bank: Bank, examples: list) -> None:
    questions = questions_of(examples, base.tokenizer)
    assert [question.reference for question in questions] == ["Ahoy!", "Fair winds, matey", "4"]  # a text asks nothing
    report = evaluate(base, bank, examples, ["poet"], EvalConfig(pattern="o", samples=2, max_new_tokens=8))
    for name, entry in (("none", None), ("poet", "poet")):
        texts = generate(base, bank, [question.prompt for question in questions], entry, max_new_tokens=8)
        assert row(report, name).pattern_rate == pytest.approx(sum("o" in text for text in texts) / 3)
        assert [sample.answers[name] for sample in report.samples] == texts[:2]
    assert report.answers == 3
    assert row(report, "poet").exact_match is None
    assert "Hi" in report.samples[0].prompt


def test_an_exact_match_is_counted(base: Base, bank: Bank, write: Callable) -> None:
    (answer,) = generate(base, bank, ["Hi"], "poet", max_new_tokens=12)
    records = [{"prompt": "Hi", "completion": f" {answer}\n"}, {"prompt": "Hi", "completion": "something else"}]
    examples = read_dataset(write(records), base.tokenizer, 256).train
    report = evaluate(base, bank, examples, ["poet"], EvalConfig(exact_match=True, max_new_tokens=12))
    assert row(report, "poet").exact_match == 0.5
    assert row(report, "none").exact_match == 0


def test_every_answer_of_a_conversation_is_asked_for(base: Base, write: Callable) -> None:
    turns = [("user", "One?"), ("assistant", "Aye"), ("user", "Two?"), ("assistant", "Nay")]
    messages = [{"role": role, "content": content} for role, content in turns]
    (example,) = read_dataset(write([{"messages": messages}]), base.tokenizer, 256).train
    first, second = questions_of([example], base.tokenizer)
    assert [first.reference, second.reference] == ["Aye", "Nay"]
    encode = base.tokenizer.apply_chat_template
    assert first.prompt == encode(messages[:1], add_generation_prompt=True, return_dict=False)
    assert base.tokenizer.decode(second.prompt).endswith("Two?<|im_end|>\n<|im_start|>assistant\n")
    # An answer that is cut off cannot be compared.
    (example,) = read_dataset(write([{"messages": messages}]), base.tokenizer, len(example.tokens) - 2).train
    assert [question.reference for question in questions_of([example], base.tokenizer)] == ["Aye"]


def test_an_answer_at_the_end_of_the_context_shortens_no_other(base: Base, bank: Bank, write: Callable) -> None:
    assert base.context == 256
    records = [{"prompt": "Hi", "completion": "Ahoy!"}, {"prompt": "x" * 215, "completion": "y"}]
    examples = read_dataset(write(records), base.tokenizer, 256).train
    config = EvalConfig(samples=2, max_new_tokens=40)
    both = evaluate(base, bank, examples, ["pirate"], config)
    alone = evaluate(base, bank, examples[:1], ["pirate"], config)
    assert both.samples[0] == alone.samples[0]


def test_the_first_examples_only(base: Base, bank: Bank, examples: list) -> None:
    seen: list[tuple[str, int, int]] = []
    report = evaluate(
        base,
        bank,
        examples,
        ["poet"],
        EvalConfig(limit=2, samples=1, max_new_tokens=2),
        on_progress=lambda *each: seen.append(each),
    )
    assert (report.examples, report.tokens) == (2, sum(each.supervised for each in examples[:2]))
    assert seen[-1] == ("answers", 2, 2)
    assert ("loss", 4, 4) in seen


def test_bad_arguments_are_named(base: Base, bank: Bank, examples: list) -> None:
    with pytest.raises(DataError, match="no examples"):
        evaluate(base, bank, [], ["poet"])
    with pytest.raises(UnknownAdapterError, match="poett"):
        evaluate(base, bank, examples, ["poett"])
    with pytest.raises(RouteError, match="invalid weight"):
        evaluate(base, bank, examples, {"x": {"poet": math.nan}})
    with pytest.raises(ConfigError, match="context of tiny is 256"):
        evaluate(base, bank, [Example([5] * 300, [5] * 300)], ["poet"])
    with pytest.raises(ConfigError) as caught:
        EvalConfig(samples=-1, limit=0, max_new_tokens=0, dpo_beta=0, pattern="(", max_tokens=True, max_rows=1.5)  # type: ignore[arg-type]
    assert len(caught.value.problems) == 7
