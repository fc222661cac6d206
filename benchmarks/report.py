"""Writes docs/benchmarks.md, docs/quality.md, their pictures and the README's table from benchmarks/results/.

    python -m benchmarks report [--check]

--check fails if a page is not what the results say, and writes nothing. No figure is typed by hand.
"""

import hashlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure, Suite, Table
from benchmarks.harness import RESULTS, ROOT

SUITES: tuple[Suite, ...] = tuple(
    import_module(f"benchmarks.suites.{name}").SUITE
    for name in (
        "adapters",
        "serve",
        "native",
        "peers",
        "four_bits",
        "classify",
        "train",
        "live",
        "page",
        "data",
        "base",
        "emulated",
        "ops",
        "busy",
        "soak",
        "preferences",
        "quality",
    )
)
DOCS = ROOT / "docs"
WRITTEN = "written by `python -m benchmarks report`"
INTRODUCTION = f"""
# Benchmarks

{WRITTEN.capitalize()} from `benchmarks/results/`, which `make bench` makes. `python -m benchmarks SUITE --help`
describes each suite. Figures are medians; the systems of a table alternate in one run, so compare figures within a
table only. The machines are shared and noisy.
"""

UNRECORDED = "CPU capability not recorded"


@dataclass(frozen=True)
class Record:
    """A result file."""

    suite: Suite
    figures: Mapping[str, Any]
    machine: str
    """With the CPU's capability."""
    provenance: str

    @classmethod
    def read(cls, suite: Suite, path: Path) -> "Record":
        record = json.loads(path.read_text(encoding="utf-8"))
        capability = record.get("cpu_capability", UNRECORDED)
        if record.get("bfloat16_arithmetic"):
            capability += " with bfloat16 arithmetic"
        versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
        return cls(
            suite,
            record["figures"],
            f"{record['machine']} ({capability})",
            f"Versions: {versions}. Commit: {record['commit']}.",
        )

    def missed(self) -> list[str]:
        """Return a row for each figure that misses its target."""
        suite = f"[{self.suite.title}](#{anchor(self.suite.title)})"
        lines: list[str] = []
        for table, rows in self.suite.cells(self.figures).items():
            for row, cells in rows.items():
                figure = table.figure(row)
                misses = {column: value for column, value in cells.items() if figure.met(value) is False}
                if misses:
                    cell = values(figure, misses)
                    lines.append(f"| {suite} | {figure.label} | {cell} | {figure.target_text} | {self.machine} |")
        return lines


def read_records(suite: Suite) -> list[Record]:
    """Return a suite's result files: those that name a capability first, the widest of them first."""
    paths = [*sorted(RESULTS.glob(f"{suite.name}.*.json"), reverse=True), RESULTS / f"{suite.name}.json"]
    return [Record.read(suite, path) for path in paths if path.exists()]


def main(arguments: Sequence[str]) -> None:
    check = "--check" in arguments
    results = {suite: read_records(suite) for suite in SUITES}
    pages = {ROOT / "README.md": with_blocks((ROOT / "README.md").read_text(encoding="utf-8"), results)}
    pages |= {
        path: with_blocks(path.read_text(encoding="utf-8"), results)
        for path in DOCS.glob("*.md")
        if path.name not in {suite.page for suite in SUITES}
    }
    pages[DOCS / "benchmarks.md"] = page(INTRODUCTION, {s: r for s, r in results.items() if s.page == "benchmarks.md"})
    for suite, records in results.items():
        if suite.page != "benchmarks.md":
            pages[DOCS / suite.page] = page("", {suite: records})
    stale = [path.name for path, text in pages.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    pictures = {picture(suite): records[0] for suite, records in results.items() if suite.picture and records}
    stale += [path.name for path, record in pictures.items() if not is_drawn(path, record)]
    if check:
        sys.exit(f"stale: {', '.join(stale)}; run python -m benchmarks report" if stale else 0)
    for path, text in pages.items():
        path.write_text(text, encoding="utf-8")
    for path, record in pictures.items():
        if not is_drawn(path, record):
            draw(path, record)


# ---- pages


def page(introduction: str, results: Mapping[Suite, Sequence[Record]]) -> str:
    """Return a page of suites; one suite's page is headed by its title."""
    level = "##" if introduction else "#"
    lines = [introduction.strip(), ""] if introduction else []
    missed = [line for records in results.values() for record in records for line in record.missed()]
    if introduction and missed:
        lines += ["## Missed targets", "", "| | | measured | target | machine |", "|---" * 5 + "|", *missed, ""]
    for suite, records in results.items():
        if records:
            lines += [f"{level} {suite.title}", "", *section(suite, records, level), ""]
    return "\n".join(lines)


def section(suite: Suite, records: Sequence[Record], level: str) -> list[str]:
    lines = [f"{suite.setting}. `python -m benchmarks {suite.name}`.", "", suite.notes.strip()]
    if suite.picture:
        path, _, text = suite.picture.partition(": ")
        lines += ["", f"![{text}]({path})"]
    for record in records:
        lines += ["", f"{level}# {record.machine}", "", record.provenance]
        findings = suite.findings(record.figures)
        lines += ["", *findings] if findings else []
        for table, rows in suite.cells(record.figures).items():
            lines += ["", f"**{table.title}**", "", *grid(table, rows)]
    return lines


def grid(table: Table, rows: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return a table; a cell is empty where nothing was measured."""
    columns = list(dict.fromkeys(column for cells in rows.values() for column in cells))
    targets = any(table.figure(row).target for row in rows)
    head = [*(columns if columns != [""] else ["measured"]), *(["target"] if targets else [])]
    lines = [f"| | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    for row, cells in rows.items():
        figure = table.figure(row)
        texts = [table.figure(row, column).text(cells[column]) if column in cells else "" for column in columns]
        label = figure.label
        lines.append(f"| {' | '.join([label, *texts, *([figure.target_text] if targets else [])])} |")
    return lines


def anchor(title: str) -> str:
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


# ---- blocks in pages that people write


def with_blocks(text: str, results: Mapping[Suite, Sequence[Record]]) -> str:
    """Fill what stands between <!-- benchmarks: … --> or <!-- demo: … --> and its end."""
    for name, content in {"benchmarks": lambda: headlines(results), "demo": demo}.items():
        pattern = rf"<!-- {name}: .*? -->\n.*?<!-- /{name} -->"
        if re.search(pattern, text, re.DOTALL):
            block = f"<!-- {name}: {WRITTEN} -->\n{content()}\n<!-- /{name} -->"
            text = re.sub(pattern, lambda _, block=block: block, text, flags=re.DOTALL)
    return text


def headlines(results: Mapping[Suite, Sequence[Record]]) -> str:
    """Return the figures that are declared as headlines, each with its machine."""
    rows: dict[str, list[str]] = {}
    for suite in results:
        for table in suite.tables:
            for figure in table.figures:
                if figure.headline and not rows.get(figure.headline):  # of a suite's first table: its first dtype
                    rows[figure.headline] = headline(table, table.figure(figure.key), results[suite])
    lines = ["| | measured | target | machine |", "|---|---|---|---|", *chain.from_iterable(rows.values())]
    missed = sum(len(record.missed()) for records in results.values() for record in records)
    return "\n".join([*lines, "", f"[All figures](docs/benchmarks.md); {missed} of their targets are missed."])


def headline(table: Table, figure: Figure, records: Sequence[Record]) -> list[str]:
    """Return a figure's row, from the first record that has it."""
    for record in records:
        if cells := record.suite.cells(record.figures).get(table, {}).get(figure.key):
            machine = record.machine.removesuffix(f" ({UNRECORDED})")  # docs/benchmarks.md says so
            return [f"| {figure.headline} | {values(figure, cells)} | {figure.target_text} | {machine} |"]
    return []


def values(figure: Figure, cells: Mapping[str, float]) -> str:
    """Return a row's values in one cell, each with its column."""
    return "; ".join(
        f"{column}: {figure.text(value)}" if column else figure.text(value) for column, value in cells.items()
    )


def demo() -> str:
    """Return the second half of what `loradeck demo` prints."""
    text = (RESULTS / "demo.txt").read_text(encoding="utf-8")
    return f"```text\n{text[text.index('3. Back from disk') : text.index('What to try next')].strip()}\n```"


# ---- pictures


def picture(suite: Suite) -> Path:
    return DOCS / suite.picture.partition(":")[0]


def digest(record: Record) -> str:
    content = json.dumps([record.figures, record.machine])
    return f"figures {hashlib.sha256(content.encode()).hexdigest()[:16]}"


def is_drawn(path: Path, record: Record) -> bool:
    """Say whether a picture is of these figures: it holds their digest."""
    return path.exists() and digest(record) in path.read_text(encoding="utf-8")


def draw(path: Path, record: Record) -> None:
    import matplotlib as mpl

    mpl.rcParams["svg.hashsalt"] = record.suite.name  # equal figures make an equal file
    assert record.suite.draw is not None
    drawing = record.suite.draw(record.figures, record.machine)
    drawing.savefig(path, metadata={"Date": None, "Description": digest(record)})
    print(f"written: {path}")
