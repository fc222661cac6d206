"""`loradeck check`: a dataset's form, sizes and problems, before training."""

import re
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from loradeck.cli.display.reading_progress import reading_progress
from loradeck.cli.display.text import columns, label_counts, print_json, printable
from loradeck.cli.options import AsJson, Task
from loradeck.dataset.config import DataConfig
from loradeck.train.config import TrainConfig

if TYPE_CHECKING:
    from rich.text import Text

    from loradeck.dataset.check import Duplicate, Report
    from loradeck.dataset.record import Span

READING = DataConfig()
PROBLEMS = 20  # printed; --json has them all
DUPLICATES = 3  # printed by name; --json has them all
CHARACTERS = 1000  # printed of each part of the first example
LINE = re.compile(r"[^\n]*\n|[^\n]+")


def check(
    dataset: str,
    /,
    *,
    base: str | None = None,
    task: Task = "generate",
    max_length: int = TrainConfig.max_length,
    reading: Annotated[DataConfig, Parameter(name="*")] = READING,
    as_json: AsJson = False,
) -> int:
    """Check a dataset: its form, size, mask and problems.

    The exit code is 1 if there are problems. What is passed over or left out,
    duplicate records, and records that are also in the training split, are
    listed but are not problems.

    Args:
        dataset: A file, a folder with train, valid and test, or a hub id.
        base: Tokenize for this base: lengths in tokens, and the mask.
        max_length: Maximum tokens of a sequence; longer ones are cut at the end.
    """
    from loradeck.dataset.check import check_dataset

    tokenizer = None
    if base is not None:
        from loradeck.base.load import load_tokenizer

        tokenizer = load_tokenizer(base)
    with reading_progress() as on_read:
        report = check_dataset(dataset, tokenizer, max_length, reading, task=task, on_read=on_read)
    if as_json:
        print_json(report)
    else:
        _print(report, task)
    return int(bool(report.problems))


def _print(report: "Report", task: str) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    print(printable(f"{report.name}: {report.form}\n"))
    print(_table(report))
    for split, part in report.splits.items():
        if part.labels:
            print(f"{split}: {len(part.labels):,} labels: {label_counts(part.labels)}")
    for split, part in report.splits.items():
        for duplicates, remark in (
            (part.duplicates, f"{split}: duplicate"),
            (part.leaked, f"{split}: also in train"),
            (part.prompts, f"{split}: prompt in train, with another answer"),
        ):
            _print_duplicates(duplicates, remark)
    for index, example in enumerate(report.first):
        which = ("chosen", "rejected")[index] if len(report.first) > 1 else "example"
        console.print(f"\n[bold]The first {which}[/]: what is read, and what is learned")
        console.print(mask(example), soft_wrap=True)
    print()
    for line in _notes(report):
        print(printable(line))
    for problem in report.problems[:PROBLEMS]:
        print(printable(str(problem)))
    if len(report.problems) > PROBLEMS:
        print(f"and {len(report.problems) - PROBLEMS:,} more")
    if not report.problems:
        print("no problems")
        return
    from loradeck.dataset.finding import error_of
    from loradeck.dataset.label import forms_of

    error = error_of(report.name, report.problems, f"Each record has {forms_of(task).expected}.")
    count, records = len(report.problems), sum(problem.records for problem in report.problems)
    where = f" in {records:,} records" if records > count else ""
    print(f"{count} problem{'s' * (count > 1)}{where}: fix or remove these records. {error.hint_for('cli')}")


def _notes(report: "Report") -> list[str]:
    """Return what is passed over, left out, or read otherwise than written, in lines."""
    keys = ", ".join(f"{each.what} (in {each.records:,} record{'s' * (each.records != 1)})" for each in report.unused)
    return [*([f"passed over: {keys}"] if keys else []), *map(str, report.remarks)]


def _table(report: "Report") -> str:
    head = ["split", "records", "examples", "min", "median", "95 %", "max", report.unit, "learned", "truncated"]
    head += ["duplicates", "in train", "prompt in train"]
    rows: list[list[str]] = []
    for split, part in report.splits.items():
        lengths = part.lengths
        rows.append(
            [
                split,
                *(f"{n:,}" for n in (part.records, part.examples)),
                *(
                    [f"{n:,}" for n in (lengths.min, lengths.median, lengths.p95, lengths.max)]
                    if lengths
                    else ["-"] * 4
                ),
                f"{part.total:,}",
                f"{part.supervised / max(1, part.total):.1%}",
                *(f"{n:,}" for n in (part.truncated, len(part.duplicates), len(part.leaked), len(part.prompts))),
            ]
        )
    return columns([head, *rows], right=range(1, len(head)))


def _print_duplicates(duplicates: "list[Duplicate]", remark: str) -> None:
    for duplicate in duplicates[:DUPLICATES]:
        print(printable(f"{remark}: {duplicate.location}, as {duplicate.of}"))
    if len(duplicates) > DUPLICATES:
        print(f"{remark}: and {len(duplicates) - DUPLICATES:,} more")


def mask(example: "list[Span]") -> "Text":
    """Return an example line by line: learned lines are marked and green, read ones dim, line feeds visible."""
    from rich.text import Text

    lines = Text()
    for text, learned in example:
        if len(text) > CHARACTERS:
            text = f"{text[:CHARACTERS]}… ({len(text) - CHARACTERS:,} more characters)"
        label, style = ("learned", "green") if learned else ("read   ", "dim")
        for line in LINE.findall(text):
            lines.append(f"{label}  {printable(line).replace(chr(10), '⏎')}\n", style=style)
    lines.rstrip()
    return lines
