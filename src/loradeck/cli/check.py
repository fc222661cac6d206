"""`loradeck check`: what a dataset is and what is wrong with it, before it is trained on. Prints; finds out nothing."""

import re
from typing import TYPE_CHECKING

from loradeck.cli.options import AsJson
from loradeck.cli.screen import columns, print_json, shown
from loradeck.train.config import TrainConfig

if TYPE_CHECKING:
    from rich.text import Text

    from loradeck.dataset.check import Duplicate, Report
    from loradeck.dataset.record import Span

FEW = 3  # twins that are named; --json has them all
SHOWN = 1000  # characters of each part of the first example
LINE = re.compile(r"[^\n]*\n|[^\n]+")


def check(
    dataset: str,
    /,
    *,
    base: str | None = None,
    max_length: int = TrainConfig.max_length,
    as_json: AsJson = False,
) -> int:
    """Check a dataset: its form and size, what of it is learned, and every problem.

    The exit code is 1 where there are problems. Records that are there twice,
    or in the training split too, are counted and named, and are no problem.

    Args:
        dataset: A file, a folder with train, valid and test, or a hub id.
        base: Also read it as this base would: lengths in tokens, and the mask.
        max_length: Tokens per sequence; longer ones are cut at the end.
    """
    from loradeck.dataset.check import check_dataset

    tokenizer = None
    if base is not None:
        from loradeck.base.load import load_tokenizer

        tokenizer = load_tokenizer(base)
    report = check_dataset(dataset, tokenizer, max_length)
    if as_json:
        print_json(report)
    else:
        _print(report)
    return int(bool(report.problems))


def _print(report: "Report") -> None:
    from rich.console import Console

    console = Console(highlight=False)
    print(shown(f"{report.name}: {report.form}\n"))
    print(_table(report))
    for split, part in report.splits.items():
        for twins, said in (
            (part.duplicates, f"{split}: there twice"),
            (part.leaked, f"{split}: in train too"),
            (part.prompts, f"{split}: prompt in train, with another answer"),
        ):
            _name(twins, said)
    for at, example in enumerate(report.first):
        which = ("chosen", "rejected")[at] if len(report.first) > 1 else "example"
        console.print(f"\n[bold]The first {which}[/]: what is read, and what is learned")
        console.print(mask(example), soft_wrap=True)
    print()
    for problem in report.problems:
        print(shown(problem))
    if not report.problems:
        print("no problems")
        return
    from loradeck.dataset.read import HINT

    count = len(report.problems)
    print(f"{count} problem{'s' * (count > 1)}: mend or remove these records. {HINT}")


def _table(report: "Report") -> str:
    head = ["split", "records", "examples", "min", "median", "95 %", "max", report.unit, "learned", "truncated"]
    head += ["twice", "in train", "prompt in train"]
    rows = [
        [
            split,
            *(f"{number:,}" for number in (part.records, part.examples)),
            *((f"{n:,}" for n in (own.min, own.median, own.p95, own.max)) if (own := part.lengths) else "----"),
            f"{part.total:,}",
            f"{part.supervised / max(1, part.total):.1%}",
            *(f"{n:,}" for n in (part.truncated, len(part.duplicates), len(part.leaked), len(part.prompts))),
        ]
        for split, part in report.splits.items()
    ]
    return columns([head, *rows], right=range(1, len(head)))


def _name(twins: "list[Duplicate]", said: str) -> None:
    for twin in twins[:FEW]:
        print(shown(f"{said}: {twin.location}, as {twin.of}"))
    if len(twins) > FEW:
        print(f"{said}: and {len(twins) - FEW:,} more")


def mask(example: "list[Span]") -> "Text":
    """Lay out an example line by line: learned lines are marked and green, read ones dim, line feeds visible."""
    from rich.text import Text

    lines = Text()
    for text, learned in example:
        cut = text if len(text) <= SHOWN else f"{text[:SHOWN]}… ({len(text) - SHOWN:,} more characters)"
        word, style = ("learned", "green") if learned else ("read   ", "dim")
        for line in LINE.findall(cut):
            lines.append(f"{word}  {shown(line).replace(chr(10), '⏎')}\n", style=style)
    lines.rstrip()
    return lines
