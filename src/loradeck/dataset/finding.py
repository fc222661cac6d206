"""What was found in a dataset: told once for each cause, with the number of records and the first places."""

import re
from typing import Self

import msgspec

from loradeck.errors import DataError

FIRST = 3  # places that are kept, unless more are asked for
VARYING = re.compile(r"(?<=the keys are ).*|, at ['\"].*|\d+")  # from record to record, though the cause is the same


class Finding(msgspec.Struct, omit_defaults=True):
    """One cause, and the records that it concerns."""

    what: str
    """As found in the first of them, as `path: what` if it concerns one key."""
    records: int = 0
    """How many; 0 for a finding about a file or a split."""
    first: list[str] = []
    """The places of the first of them, each as `file:line`."""
    hint: str = ""
    python: str = ""
    cli: str = ""
    http: str = ""
    """How to mend it, as in an error: the hint, and what to add to it at each door."""

    @classmethod
    def of(cls, error: DataError) -> Self:
        """Return an error as a finding, still without a record."""
        return cls(error.message, hint=error.hint, python=error.python, cli=error.cli, http=error.http)

    def __str__(self) -> str:
        where = f"{self.first[0]}: " if self.first else ""
        others = ", ".join(self.first[1:]) + ", …" * (self.records > len(self.first))
        return f"{where}{self.what}" + (f" (in {self.records:,} records: also {others})" if others else "")


class Findings:
    """Findings by their causes, in order of appearance."""

    def __init__(self, *, by_cause: bool = True, places: int = FIRST) -> None:
        """Group findings by their causes, or only equal ones; keep the first `places` of each."""
        self._findings: dict[str, Finding] = {}
        self._by_cause, self._places = by_cause, places

    def add(self, finding: Finding, location: str = "") -> None:
        """Count a record, at `file:line`, under a finding's cause."""
        key = VARYING.sub("", finding.what) if self._by_cause else finding.what
        finding = self._findings.setdefault(key, finding)
        if location:
            finding.records += 1
            finding.first += [location] * (len(finding.first) < self._places)

    def list(self) -> list[Finding]:
        """Return the findings."""
        return [*self._findings.values()]


def error_of(name: str, problems: list[Finding], hint: str) -> DataError:
    """Return the error of a dataset with problems; `hint` is for those that bring none of their own."""
    count, records = len(problems), sum(problem.records for problem in problems)
    where = f" in {records:,} records" if records > count else ""
    hint = "" if all(problem.hint for problem in problems) else hint
    python, cli, http = (
        " ".join(dict.fromkeys(f"{problem.hint} {getattr(problem, door)}".strip() for problem in problems)).strip()
        for door in ("python", "cli", "http")
    )
    if python == cli == http:  # as any door says it
        hint, python, cli, http = f"{hint} {python}".strip(), "", "", ""
    return DataError(
        f"{name} has {count} problem{'s' * (count > 1)}{where} and cannot be trained on",
        [str(problem) for problem in problems],
        hint=hint,
        python=python,
        cli=cli,
        http=http,
    )
