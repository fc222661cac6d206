"""What an evaluation found: one row for each adapter, and answers side by side."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from transformers import PreTrainedTokenizerBase

from loradeck.dataset.example import Example, Preference
from loradeck.evaluation.config import EvalConfig
from loradeck.evaluation.labels import LabelReport, label_reports, macro_f1, micro_f1
from loradeck.evaluation.question import Question


@dataclass(frozen=True, slots=True)
class AdapterReport:
    """How one adapter, a blend or the base did; None where it was not measured or does not apply."""

    adapter: str
    loss: float
    """Nats per trained token, or per label; for preference pairs the loss per pair, -log σ(margin)."""
    perplexity: float | None = None
    """exp(loss); None for preference pairs and labels."""
    exact_match: float | None = None
    """Share of answers that equal the dataset's."""
    pattern_rate: float | None = None
    """Share of answers in which the pattern is found."""
    accuracy: float | None = None
    """Share of labels that are right, or of preference pairs with a margin above 0; None for DPO's reference."""
    margin: float | None = None
    """Mean of β · ((log p(chosen) - log p_base(chosen)) - (log p(rejected) - log p_base(rejected))); of a reward model,
    of r(chosen) - r(rejected)."""
    f1: float | None = None
    """Of a classifier: the mean of its labels' F1 (macro)."""
    micro_f1: float | None = None
    """F1 over all tags but O, if there is O; else it is the accuracy."""
    labels: list[LabelReport] | None = None
    """Of a classifier: each label."""


@dataclass(frozen=True, slots=True)
class AnswerSample:
    """One question and what each adapter answered, by its name."""

    prompt: str
    reference: str
    answers: dict[str, str]


@dataclass(frozen=True, slots=True)
class Report:
    """The result of an evaluation."""

    examples: int
    tokens: int
    """Trained tokens, or labels, that the loss is about."""
    answers: int
    """Questions that each adapter answered."""
    adapters: list[AdapterReport]
    samples: list[AnswerSample]


def report(
    examples: Sequence[Example] | Sequence[Preference],
    losses: Mapping[str, Sequence[float]],
    reference: Sequence[float] | None,
    questions: Sequence[Question],
    answers: Mapping[str, Sequence[str]],
    config: EvalConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> Report:
    """Return the report on examples from what was computed for each adapter, by its name.

    Args:
        examples: All examples, or all preference pairs.
        losses: The sum of -log p over the trained tokens of each sequence; a pair is two, the chosen one first.
        reference: The base's losses, for preference pairs.
        questions: Those that were answered.
        answers: The answers, by adapter; empty if there are none.
        config: What is measured.
        tokenizer: The base's.
    """
    tokens = sum(example.supervised for example in examples)
    adapters = []
    for name in losses:
        margins = None if reference is None else _margins(losses[name], reference, config.dpo_beta)
        loss = sum(losses[name]) / tokens if margins is None else fmean(map(_dpo_loss, margins))
        is_reference = margins is not None and losses[name] is reference
        pairs = None if is_reference else margins
        adapters.append(
            AdapterReport(
                adapter=name,
                loss=loss,
                perplexity=_exp(loss) if margins is None else None,
                exact_match=_exact_match(answers.get(name, ()), questions) if config.exact_match else None,
                pattern_rate=_pattern_rate(answers.get(name, ()), config.pattern),
                accuracy=None if pairs is None else fmean(margin > 0 for margin in pairs),
                margin=None if pairs is None else fmean(pairs),
            )
        )
    samples = [
        AnswerSample(
            str(tokenizer.decode([*question.prompt], skip_special_tokens=True)).strip(),
            question.reference,
            {name: answers[name][index] for name in losses},
        )
        for index, question in enumerate(questions[: config.samples])
    ]
    return Report(len(examples), tokens, len(questions), adapters, samples)


def labels_report(
    examples: Sequence[Example],
    losses: Mapping[str, float],
    references: Sequence[str],
    predictions: Mapping[str, Sequence[str]],
) -> Report:
    """Return the report on classifiers.

    Args:
        examples: All examples.
        losses: The sum of -log p over all labels, by adapter.
        references: The dataset's labels, one after the other.
        predictions: The most likely labels, by adapter.
    """
    adapters = []
    for name, answers in predictions.items():
        labels = label_reports(references, answers)
        adapters.append(
            AdapterReport(
                adapter=name,
                loss=losses[name] / len(references),
                accuracy=sum(label.correct for label in labels) / len(references),
                f1=macro_f1(labels),
                micro_f1=micro_f1(labels),
                labels=labels,
            )
        )
    return Report(len(examples), len(references), 0, adapters, [])


def rewards_report(examples: Sequence[Preference], rewards: Mapping[str, Sequence[float]]) -> Report:
    """Return the report on reward models from the rewards of the chosen and the rejected answer of each pair."""
    adapters = []
    for name, values in rewards.items():
        margins = [chosen - rejected for chosen, rejected in zip(values[::2], values[1::2], strict=True)]
        adapters.append(
            AdapterReport(
                adapter=name,
                loss=fmean(map(_dpo_loss, margins)),
                accuracy=fmean(margin > 0 for margin in margins),
                margin=fmean(margins),
            )
        )
    return Report(len(examples), sum(example.supervised for example in examples), 0, adapters, [])


def _margins(losses: Sequence[float], reference: Sequence[float], beta: float) -> list[float]:
    rewards = [beta * (base - loss) for loss, base in zip(losses, reference, strict=True)]  # log p is minus the loss
    return [chosen - rejected for chosen, rejected in zip(rewards[::2], rewards[1::2], strict=True)]


def _dpo_loss(margin: float) -> float:
    """Return -log σ(margin)."""
    return math.log1p(math.exp(-margin)) if margin > -500 else -margin


def _exact_match(answers: Sequence[str], questions: Sequence[Question]) -> float | None:
    pairs = [*zip(answers, questions, strict=True)]
    return fmean(answer.strip() == question.reference.strip() for answer, question in pairs) if pairs else None


def _pattern_rate(answers: Sequence[str], pattern: str | None) -> float | None:
    if pattern is None or not answers:
        return None
    return fmean(re.search(pattern, answer) is not None for answer in answers)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
