"""`loradeck eval`: adapters and the base measured side by side on one dataset."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from loradeck.base.onednn import cap_kernel_cache
from loradeck.cli import blend
from loradeck.cli.display.reading_progress import reading_progress
from loradeck.cli.display.text import columns, print_json, printable
from loradeck.cli.options import Adapters, AsJson, Dtype, Task, Weights
from loradeck.dataset.config import DataConfig
from loradeck.errors import DataError
from loradeck.evaluation.config import EvalConfig
from loradeck.train.config import TrainConfig

if TYPE_CHECKING:
    from loradeck.dataset.read import Dataset, SplitExamples
    from loradeck.dataset.source import Split
    from loradeck.evaluation.evaluator import OnProgress
    from loradeck.evaluation.report import AdapterReport, Report
    from loradeck.lora.manifest import AdapterFiles

CONFIG, READING = EvalConfig(), DataConfig()
HEADER = ("adapter", "loss", "perplexity", "exact match", "pattern", "accuracy", "margin", "F1", "micro F1")


def eval(
    base: str,
    dataset: str,
    /,
    *,
    adapters: Adapters = (),
    split: Literal["train", "valid", "test"] | None = None,
    config: Annotated[EvalConfig, Parameter(name="*")] = CONFIG,
    reading: Annotated[DataConfig, Parameter(name="*")] = READING,
    max_length: int = TrainConfig.max_length,
    task: Task = "generate",
    dtype: Dtype = "auto",
    weights: Weights = "blocks",
    as_json: AsJson = False,
) -> None:
    """Measure adapters, and the base, side by side on a dataset.

    All are computed in one pass over the base: the loss on what the dataset
    trains on, greedy answers to its questions, or for preference pairs DPO's
    accuracy and margin; with --task classify or tokens accuracy and F1, label
    by label. ADAPTER is a folder, or a blend such as
    adapters/poet*0.7+adapters/pirate*0.3. The base is the row `none`.

    Args:
        base: A folder, a hub id, a .gguf file, or smollm2-135m.
        dataset: A file, a folder with train, valid and test, or a hub id.
        split: The split to evaluate on; by default test, or valid, or else all there is.
        max_length: Maximum tokens of a sequence; longer ones are cut at the end.
    """
    files = blend.read(adapters)

    from loradeck.base.load import Base, load_tokenizer
    from loradeck.dataset.read import read_dataset

    with reading_progress() as on_read:
        tokenizer, labels = load_tokenizer(base), _labels(files.values())
        data = read_dataset(dataset, tokenizer, max_length, reading, task=task, labels=labels, on_read=on_read)
    chosen, examples = _split(data, split)

    from loradeck.evaluation.evaluator import BASE, evaluate
    from loradeck.lora.bank import Bank

    cap_kernel_cache()
    loaded = Base.load(base, dtype=dtype, weights=weights, task=task)
    bank = Bank(loaded.model)
    texts = [text for text in dict.fromkeys(adapters) if text != BASE]
    entries = dict(zip(texts, blend.load(bank, texts, files), strict=True))
    with _progress() as on_progress:
        report = evaluate(loaded, bank, examples, entries, config, labels=data.labels, on_progress=on_progress)
    if as_json:
        print_json(report)
        return
    counts = {"generate": f", {report.tokens:,} trained tokens", "reward": ""}.get(task, f", {report.tokens:,} labels")
    print(printable(f"{dataset}, {chosen}: {report.examples:,} examples{counts}\n"))
    print(table(report))
    if data.labels:
        print(f"\n{label_table(report)}")
    for sample in report.samples:
        print(printable(f"\n> {sample.prompt}\n[dataset] {sample.reference}"))
        for name, answer in sample.answers.items():
            print(printable(f"[{name}] {answer}"))


def _split(data: "Dataset", name: "Split | None") -> "tuple[Split, SplitExamples]":
    """Return the split to evaluate on, and its examples.

    Raises:
        DataError: the dataset has no such split.
    """
    splits: dict[Split, SplitExamples] = {"test": data.test, "valid": data.valid, "train": data.train}
    present = [split for split, examples in splits.items() if examples]
    if name is not None and name not in present:
        raise DataError(f"{data.name} has no {name} split", hint=f"It has {' and '.join(present)}.")
    name = name or present[0]
    return name, splits[name]


def _labels(adapters: "Iterable[AdapterFiles]") -> tuple[str, ...]:
    """Return the labels that all adapters have, of those that record theirs; empty if none does."""
    lists = [labels for files in adapters if (labels := files.origin.labels)]
    return tuple(label for label in lists[0] if all(label in labels for labels in lists)) if lists else ()


def label_table(report: "Report") -> str:
    """Return the F1 of each label with its count, adapters side by side."""
    rows: dict[str, list[str]] = {}
    for place, adapter in enumerate(report.adapters):
        for label in adapter.labels or ():
            row = rows.setdefault(label.label, [label.label, f"{label.count:,}", *["-"] * len(report.adapters)])
            row[2 + place] = f"{label.f1:.3f}"
    head = ["label", "count", *(f"F1 {adapter.adapter}" for adapter in report.adapters)]
    return columns([head, *rows.values()], right=range(1, len(head)))


def table(report: "Report") -> str:
    """Return a report's rows as aligned columns, without those that were not measured."""
    rows = [_cells(each) for each in report.adapters]
    used = [at for at in range(len(HEADER)) if any(row[at] for row in rows)]
    return columns([[row[at] or "-" for at in used] for row in (HEADER, *rows)], right=range(1, len(used)))


def _cells(row: "AdapterReport") -> tuple[str, ...]:
    def cell(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    return (
        row.adapter,
        cell(row.loss, ".4f"),
        cell(row.perplexity, ".4g"),
        cell(row.exact_match, ".1%"),
        cell(row.pattern_rate, ".1%"),
        cell(row.accuracy, ".1%"),
        cell(row.margin, "+.4f"),
        cell(row.f1, ".3f"),
        cell(row.micro_f1, ".3f"),
    )


@contextmanager
def _progress() -> "Iterator[OnProgress | None]":
    """Show on standard error, if it is a terminal, how much is done."""
    from rich.console import Console
    from rich.progress import Progress, TaskID

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    tasks: dict[str, TaskID] = {}
    with Progress(console=console, transient=True) as progress:

        def show(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = progress.add_task(phase, total=total)
            progress.update(tasks[phase], completed=done)

        yield show
