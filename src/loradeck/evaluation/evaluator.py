"""Evaluate any number of adapters on one dataset in one pass over the base."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TypeAlias

import torch
from torch.nn.functional import cross_entropy

from loradeck.base.load import Base
from loradeck.dataset.example import UNSUPERVISED, Example, Preference
from loradeck.errors import ConfigError, DataError
from loradeck.evaluation.config import EvalConfig
from loradeck.evaluation.labels import check_labels, label_names
from loradeck.evaluation.question import Question, questions_of
from loradeck.evaluation.report import Report, labels_report, report, rewards_report
from loradeck.generation import generate
from loradeck.lora.bank import Bank
from loradeck.lora.routing import RouteEntry
from loradeck.train.batching import split_units
from loradeck.train.classifier import ClassifierLosses, check_kind, losses_of
from loradeck.train.mode import evaluation

BASE = "none"  # the base's row
DEFAULT = EvalConfig()
OnProgress: TypeAlias = Callable[[str, int, int], None]


def evaluate(
    base: Base,
    bank: Bank,
    examples: Sequence[Example] | Sequence[Preference],
    adapters: Sequence[str] | Mapping[str, RouteEntry] = (),
    config: EvalConfig = DEFAULT,
    *,
    labels: Sequence[str] = (),
    on_progress: OnProgress | None = None,
) -> Report:
    """Measure adapters, and the base itself, on the same examples.

    Forward batches have rows of all adapters, each routed through its own, so a result does not depend on the others.
    Of classifiers the labels are measured, by their names, so that they may have other numbers than the dataset's; of
    reward models the preferences. A base without a head of its own is then left out.

    Args:
        base: The base.
        bank: The bank on it that holds the adapters.
        examples: A split of a dataset, as `loradeck.dataset.read.read_dataset` returns it.
        adapters: Resident adapters; or for each row of the report its entry of `bank.route`. The base is always in the
            report, as "none".
        config: What is measured.
        labels: For classifiers, the names of the examples' labels: those of the Dataset.
        on_progress: Called with "loss" or "answers", how much of it is done, and how much there is.

    Raises:
        DataError: there are no examples.
        ConfigError: an example is longer than the base's context or for another task than the base's, or an adapter
            does not have one of the labels.
        UnknownAdapterError: a name is not resident.
        RouteError: an invalid entry.
    """
    entries: dict[str, RouteEntry] = {BASE: None}
    if isinstance(adapters, Mapping):
        entries |= adapters
    else:
        entries |= {name: name for name in adapters if name != BASE}
    if config.limit is not None:
        examples = [*islice(examples, config.limit)]  # type: ignore[assignment]
    if not examples:
        raise DataError("there are no examples to evaluate on", hint="Give at least one.")
    progress = on_progress or (lambda *_: None)
    check_kind(examples[0], base.task)
    if base.task != "generate" and (config.exact_match or config.pattern is not None):
        raise ConfigError(
            "exact_match and pattern are about answers, which this base does not give", hint="Leave them out."
        )
    if vars(base.model).get("missing_weights"):
        del entries[BASE]
    if not entries:
        raise ConfigError(f"{base.name} has no head of its own", hint="Give adapters to evaluate.")
    if base.task in ("classify", "tokens"):
        if not labels:
            raise ConfigError("the names of the labels are missing", python="Give labels=dataset.labels.")
        with torch.no_grad(), evaluation(base.model):
            return _labels(base, bank, examples, entries, labels, config.max_tokens, progress)  # type: ignore[arg-type]
    with torch.no_grad(), evaluation(base.model):
        rows = [each for example in examples for each in example.sequences]
        losses = _losses(base, bank, rows, entries, config.max_tokens, progress)
        if base.task == "reward":
            return rewards_report(examples, losses)  # type: ignore[arg-type]
        questions = questions_of(examples, base.tokenizer)
        questions = questions[: config.answered(len(questions))]
        answers = _answers(base, bank, questions, entries, config, progress)
    reference = losses[BASE] if isinstance(examples[0], Preference) else None
    return report(examples, losses, reference, questions, answers, config, base.tokenizer)


def _losses(
    base: Base,
    bank: Bank,
    rows: Sequence[Example],
    entries: Mapping[str, RouteEntry],
    max_tokens: int,
    progress: OnProgress,
) -> dict[str, list[float]]:
    """Return each sequence's loss, a sum over its trained tokens, or its reward, through each entry."""
    model_losses = losses_of(base)
    losses = {name: [0.0] * len(rows) for name in entries}
    for members in _members(base, rows, entries, max_tokens, progress):
        examples = [rows[at] for at, _ in members]
        routes = [entries[name] for _, name in members] if base.task == "generate" else entries[members[0][1]]
        lengths = [len(example.tokens) for example in examples] if model_losses.packed else None
        with bank.route(routes, lengths=lengths), model_losses.of(examples) as values:
            for (at, name), value in zip(members, values.tolist(), strict=True):
                losses[name][at] = value
    return losses


def _labels(
    base: Base,
    bank: Bank,
    rows: Sequence[Example],
    entries: Mapping[str, RouteEntry],
    labels: Sequence[str],
    max_tokens: int,
    progress: OnProgress,
) -> Report:
    """Return the report on the labels that each entry gives."""
    names = {name: label_names(base, bank, entry) for name, entry in entries.items()}
    for name in names:
        check_labels(labels, names[name], f"{name!r}" if name != BASE else f"the base {base.name}")
    numbers = {name: [outputs.index(label) for label in labels] for name, outputs in names.items()}
    classifier = ClassifierLosses(base.model)
    losses = dict.fromkeys(entries, 0.0)
    predictions: dict[str, dict[int, list[str]]] = {name: {} for name in entries}
    for members in _members(base, rows, entries, max_tokens, progress):
        examples = [rows[at] for at, _ in members]
        with bank.route(entries[members[0][1]]):
            scores = classifier.scores(examples).split([example.supervised for example in examples])
        for (at, name), example, logits in zip(members, examples, scores, strict=True):
            logits = logits[:, : len(names[name])]
            targets = [numbers[name][label] for label in example.labels if label != UNSUPERVISED]
            losses[name] += float(cross_entropy(logits, torch.tensor(targets, device=logits.device), reduction="sum"))
            predictions[name][at] = [names[name][number] for number in logits.argmax(-1).tolist()]
    references = [labels[label] for example in rows for label in example.labels if label != UNSUPERVISED]
    in_order = {name: [label for at in range(len(rows)) for label in each[at]] for name, each in predictions.items()}
    return labels_report(rows, losses, references, in_order)


def _members(
    base: Base, rows: Sequence[Example], entries: Mapping[str, RouteEntry], max_tokens: int, progress: OnProgress
) -> Iterator[list[tuple[int, str]]]:
    """Yield batches of sequences, by their places, and the entries to route them through; short sequences first.

    Those of a classifier or reward model are of one entry each: it may compute a module once for all rows, as DeBERTa
    its relative positions.

    Raises:
        ConfigError: a sequence is longer than the base's context.
    """
    longest = max(len(example.tokens) for example in rows)
    if base.context is not None and longest > base.context:
        raise ConfigError(
            f"the longest example has {longest} tokens; the context of {base.name} is {base.context}",
            hint=f"Set max_length to {base.context} or less.",
        )
    by_length = sorted(range(len(rows)), key=lambda at: len(rows[at].tokens))
    done = 0
    for names in [[*entries]] if base.task == "generate" else [[name] for name in entries]:
        order = [(at, name) for at in by_length for name in names]
        places = iter(order)
        for batch in split_units([(rows[at],) for at, _ in order], max_tokens):
            members = [*islice(places, len(batch))]
            yield members
            done += len(members)
            progress("loss", done, len(rows) * len(entries))


def _answers(
    base: Base,
    bank: Bank,
    questions: Sequence[Question],
    entries: Mapping[str, RouteEntry],
    config: EvalConfig,
    progress: OnProgress,
) -> dict[str, list[str]]:
    """Return the greedy answer to each question through each entry."""
    answers = {name: [""] * len(questions) for name in entries}
    done = 0
    for batch in _batches(questions, max(1, config.max_rows // len(entries)), base.context, config.max_new_tokens):
        order = [(at, name) for at in batch for name in entries]
        texts = generate(
            base,
            bank,
            [questions[at].prompt for at, _ in order],
            [entries[name] for _, name in order],
            max_new_tokens=config.max_new_tokens,
        )
        for (at, name), text in zip(order, texts, strict=True):
            answers[name][at] = text
        done += len(order)
        progress("answers", done, len(questions) * len(entries))
    return answers


def _batches(questions: Sequence[Question], size: int, context: int | None, max_new_tokens: int) -> Iterator[list[int]]:
    """Batch the questions by length; one whose answer may reach the end of the context shortens nobody else's."""
    batch: list[int] = []
    for at in sorted(range(len(questions)), key=lambda at: len(questions[at].prompt)):
        fits = context is None or len(questions[at].prompt) + max_new_tokens <= context
        if batch and (len(batch) == size or not fits):
            yield batch
            batch = []
        batch.append(at)
    if batch:
        yield batch
