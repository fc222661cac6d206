"""How suites declare their figures: labels, units and targets, and the tables that show them."""

import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

Figures: TypeAlias = Mapping[str, Any]
"""What a result file holds under "figures": numbers, in nested dictionaries."""

COMPARISONS: Mapping[str, Callable[[float, float], bool]] = {
    "≥": operator.ge,
    "≤": operator.le,
    "<": operator.lt,
    "=": operator.eq,
}
PERCENT = "%"


@dataclass(frozen=True)
class Figure:
    """A row of a table. Without a label it is the key; a key such as "decode step (ms)" brings its own unit."""

    key: str
    label: str = ""
    unit: str = ""
    target: str = ""
    """A comparison and a number in the same unit: "≥ 30"."""
    headline: str = ""
    """Its label in the README's table, if it has a row there."""
    digits: int = 3

    @classmethod
    def undeclared(cls, key: str) -> "Figure":
        match = re.fullmatch(r"(.+) \(([^()]+)\)", key)
        return cls(key, match[1], match[2]) if match else cls(key, key)

    def met(self, value: float) -> bool | None:
        """Say whether a value meets the target; None if there is no target."""
        if not self.target:
            return None
        comparison, number = self.target.split(" ")
        return COMPARISONS[comparison](value, float(number))

    @property
    def target_text(self) -> str:
        """Return the target with its unit."""
        comparison, _, number = self.target.partition(" ")
        return f"{comparison} {self.number(float(number))}" if number else ""

    def text(self, value: float) -> str:
        """Return a value with its unit, and a mark if there is a target."""
        mark = {None: "", True: ", met", False: ", **✗ missed**"}[self.met(value)]
        return f"{self.number(value)}{mark}"

    def number(self, value: float) -> str:
        """Return a value with its unit."""
        if self.unit == PERCENT:
            value *= 100
        number = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{self.digits}g}"
        return f"{number}{self.unit}" if self.unit in ("", "×") else f"{number} {self.unit.replace('us', 'µs')}"


@dataclass(frozen=True)
class Table:
    """Some figures of a result file: which ones, and in which row and column."""

    title: str
    path: tuple[str, ...]
    """Their keys, outermost first; {row} and {column} stand for any text: ("step {column}", "{row}")."""
    figures: tuple[Figure, ...] = ()
    """The rows, or columns, that need a label, a unit or a target; the others are their keys."""
    unit: str = ""
    """Of every row that has none of its own."""

    def position(self, path: tuple[str, ...]) -> tuple[str, str] | None:
        """Return the row and the column of a figure, or None if it is not in this table."""
        if len(path) != len(self.path):
            return None
        names = {"row": "", "column": ""}
        for template, key in zip(self.path, path, strict=True):
            pattern = re.sub(r"\\{(row|column)\\}", r"(?P<\1>.+)", re.escape(template))
            match = re.fullmatch(pattern, key)
            if match is None:
                return None
            names |= match.groupdict()
        return names["row"], names["column"]

    def figure(self, row: str, column: str = "") -> Figure:
        """Return what is declared for a row, or else for a column."""
        by_key = {figure.key: figure for figure in self.figures}
        figure = by_key.get(row) or by_key.get(column) or Figure(row)
        name = Figure.undeclared(figure.key)
        return replace(figure, label=figure.label or name.label, unit=figure.unit or name.unit or self.unit)


@dataclass(frozen=True)
class Suite:
    """One command, its result files, and how its figures are shown."""

    name: str
    title: str
    setting: str
    """What is measured: the base, the adapters, the batch."""
    tables: tuple[Table, ...]
    """A figure belongs to the first table that takes it."""
    notes: str = ""
    page: str = "benchmarks.md"
    by_capability: bool = True
    """Whether the figures depend on what the processor can do: then each capability has a result file of its own."""
    view: Callable[[Figures], Figures] = lambda figures: figures
    """Turns what the result file holds into numbers in nested dictionaries, where it holds anything else."""
    findings: Callable[[Figures], list[str]] = lambda _: []
    """Lines in words, from the figures."""
    picture: str = ""
    """Its file in docs/, and the text that stands for it: "peers.svg: Tokens per second"."""
    draw: Callable[[Figures, str], Any] | None = None
    """(figures, machine) -> the picture, a matplotlib figure."""

    def cells(self, figures: Figures) -> dict[Table, dict[str, dict[str, float]]]:
        """Return {table: {row: {column: value}}}.

        Raises:
            KeyError: a figure is in no table.
        """
        cells: dict[Table, dict[str, dict[str, float]]] = {}
        for path, value in leaves(self.view(figures)):
            for table in self.tables:
                if position := table.position(path):
                    row, column = position
                    cells.setdefault(table, {}).setdefault(row, {})[column] = value
                    break
            else:
                raise KeyError(f"{self.name}: no table has the figure {' > '.join(path)}")
        return {table: cells[table] for table in self.tables if table in cells}


def leaves(figures: Figures, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], float]]:
    """Yield the keys and the value of every number."""
    for key, value in figures.items():
        if isinstance(value, Mapping):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value
