"""Sections of docs/benchmarks.md for result files that are grids: what was asked, by the way or system that answered.

A suite that was not run has no file and no section. Knows result files; runs nothing.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
RATE, OWN = " (tokens/s)", "loradeck"


@dataclass(frozen=True)
class Grid:
    """One result file and how to read it."""

    name: str
    title: str
    notes: tuple[str, ...]

    @property
    def path(self) -> Path:
        return RESULTS / f"{self.name}.json"

    def section(self) -> list[str]:
        record = json.loads(self.path.read_text(encoding="utf-8"))
        versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
        figures = record["figures"]
        lines = ["", f"## {self.title}", ""]
        lines += [
            f"`python -m benchmarks.{self.name}`. Machine: {record['machine']}. Versions: {versions}. "
            f"Commit: {record['commit']}."
        ]
        lines += ["", *self.notes]
        if self.name == "peers":
            return [*lines, "", *ahead(figures), "", "![Tokens per second](peers.svg)", "", *table(turned(figures))]
        for part, own in figures.items():
            lines += ["", f"### {part}", "", *table(own)]
        return lines


GRIDS = (
    Grid(
        "base",
        "A base's weights",
        (
            "What `weights=` changes: transformers' own forward passes in ms, the base's MB, and the perplexity of",
            "docstrings of Python's standard library. `plain` is transformers as it is.",
        ),
    ),
    Grid(
        "kernels",
        "Kernels",
        ("Products of frozen layers of SmolLM2-135M's shapes, by the way their weights are kept.",),
    ),
    Grid(
        "peers",
        "Peers",
        (
            "Decoding alone, in tokens per second, prompts of 64 tokens, r=8 on all linear layers. llama.cpp computes",
            "in Q4_1, the others in bfloat16; `loradeck` has packed weights, `loradeck, int8` those in int8.",
        ),
    ),
)


def table(rows: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return a table; a way that a row lacks was not tried there."""
    ways = list(dict.fromkeys(way for own in rows.values() for way in own))
    lines = [f"| | {' | '.join(ways)} |", "|---" * (len(ways) + 1) + "|"]
    return lines + [f"| {name} | {' | '.join(_figure(own.get(way)) for way in ways)} |" for name, own in rows.items()]


def turned(figures: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """{system: {what: figure}} -> {what: {system: figure}}."""
    names = dict.fromkeys(name for own in figures.values() for name in own)
    return {name: {system: own[name] for system, own in figures.items() if name in own} for name in names}


def ahead(figures: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return a line per peer: where it is faster than `loradeck`, and by how much."""
    own = {name: rate for name, rate in figures[OWN].items() if name.endswith(RATE)}
    lines: list[str] = []
    for system, theirs in figures.items():
        if system.startswith(OWN):
            continue
        times = {name.removesuffix(RATE): theirs[name] / rate for name, rate in own.items()}
        better = [f"{name} ({ratio:.2f} times)" for name, ratio in times.items() if ratio > 1]
        lines.append(f"- **{system}** is {'ahead at ' + '; '.join(better) if better else 'ahead nowhere'}.")
    return lines


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
