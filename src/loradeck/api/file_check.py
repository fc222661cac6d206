"""`GET /v1/files/{id}/check`: what an uploaded file holds, before a job trains on it; an addition to OpenAI's API."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from loradeck.api.requests import read_query
from loradeck.api.responses import json_response
from loradeck.api.state import state_of, training_of
from loradeck.api.streaming import run_until_disconnect
from loradeck.api.training_requests import CheckQuery
from loradeck.dataset.check import Lengths, SplitReport
from loradeck.dataset.finding import Finding
from loradeck.dataset.record import PAIRS, Span

if TYPE_CHECKING:
    from loradeck.live import previews as live

MOST_PROBLEMS = 50  # causes that are told of a file
MOST_LINES = 20  # lines or keys that are told of each
MOST_LABELS = 1000
CHARACTERS = 4000  # of a text


class DuplicateLine(msgspec.Struct):
    """A record and an earlier one that it equals, both as `file:line`."""

    location: str
    of: str


class SplitCheck(msgspec.Struct, kw_only=True):
    """What a split of a file holds."""

    records: int
    examples: int
    lengths: Lengths | None
    """Of its sequences; null without a valid record."""
    total: int
    """Sum of the lengths."""
    supervised: int
    """The part of `total` that is trained on."""
    truncated: int
    """Examples cut to max_length."""
    duplicates: int
    """Records that it holds twice."""
    duplicate_lines: list[DuplicateLine]
    """The first of them."""
    leaked: int
    """Records that are also in the training split."""
    labels: dict[str, int]
    """How often each label occurs, for a classifier; the most frequent ones."""

    @classmethod
    def of(cls, split: SplitReport) -> "SplitCheck":
        """Return a split as clients read it."""
        lines = [DuplicateLine(each.location, each.of) for each in split.duplicates[:MOST_LINES]]
        labels = sorted(split.labels.items(), key=lambda label: -label[1])[:MOST_LABELS]
        return cls(
            records=split.records,
            examples=split.examples,
            lengths=split.lengths,
            total=split.total,
            supervised=split.supervised,
            truncated=split.truncated,
            duplicates=len(split.duplicates),
            duplicate_lines=lines,
            leaked=len(split.leaked),
            labels=dict(labels),
        )


class FileProblem(msgspec.Struct):
    """One cause for which training would refuse a file."""

    message: str
    location: str | None
    """The first line that has it, as `file:line`; null if it concerns the file as a whole."""
    locations: list[str]
    """The first lines that have it."""
    records: int
    """How many lines have it; 0 if it concerns the file as a whole."""
    hint: str


class ShownExample(msgspec.Struct):
    """An example as it is read, in pieces: a text, and whether it is trained on. Long texts end in "…"."""

    spans: list[Span]
    rejected: list[Span] | None
    """Of a preference pair, the answer that is rejected; `spans` has the chosen one."""

    @classmethod
    def of(cls, sides: Sequence[Sequence[Span]]) -> "ShownExample":
        """Return an example as clients read it; `sides` are one, or the two of a pair."""
        shown = [[Span(_excerpt(text), trained) for text, trained in side] for side in sides]
        return cls(shown[0], shown[1] if len(shown) > 1 else None)


class FileCheck(msgspec.Struct, kw_only=True):
    """What a file holds, read as training would."""

    id: str
    form: str
    """How its records are written; "none" without a valid one."""
    method: Literal["supervised", "dpo"]
    """Of a job that trains on it."""
    unit: str
    """Of the lengths: tokens."""
    splits: dict[str, SplitCheck]
    notes: list[str]
    """What is passed over, left out, or read otherwise than written."""
    problems: list[FileProblem]
    """The first of them."""
    problem_count: int
    problem_records: int
    """Lines that have a problem."""
    first: list[ShownExample]
    object: Literal["file.check"] = "file.check"

    @classmethod
    def of(cls, id: str, check: "live.FileCheck", task: str) -> "FileCheck":
        """Return what was found in a file as clients read it; `task` is the base's."""
        report = check.report
        unused = [f"{each.what} (in {each.records:,} record{'s' * (each.records != 1)})" for each in report.unused]
        notes = [_listing("passed over: ", unused)] if unused else []
        notes += [_excerpt(str(remark)) for remark in report.remarks[:MOST_PROBLEMS]]
        return cls(
            id=id,
            form=report.form,
            method="dpo" if report.form == PAIRS and task == "generate" else "supervised",
            unit=report.unit,
            splits={name: SplitCheck.of(split) for name, split in report.splits.items()},
            notes=notes,
            problems=[_problem(each) for each in report.problems[:MOST_PROBLEMS]],
            problem_count=len(report.problems),
            problem_records=sum(each.records for each in report.problems),
            first=[ShownExample.of(sides) for sides in check.first],
        )


async def check_file(request: Request) -> Response:
    """Say what a file holds, and what training would refuse in it."""
    training, state, owner = training_of(request), state_of(request), request.state.key.name
    id, query = request.path_params["id"], read_query(request, CheckQuery)

    async def check() -> "live.FileCheck":
        async with state.lock(f"previews of {owner}"):  # one at a time, so that others have their turn
            return await training.previews.check(id, owner, query.max_length)

    (result,) = await run_until_disconnect(request.receive, check())
    return json_response(FileCheck.of(id, result, training.base.task))


def _problem(finding: Finding) -> FileProblem:
    location = finding.first[0] if finding.first else None
    hint = f"{finding.hint} {finding.http}".strip()
    return FileProblem(_excerpt(finding.what), location, finding.first, finding.records, hint)


def _listing(head: str, items: Sequence[str]) -> str:
    rest = len(items) - MOST_LINES
    return _excerpt(head + ", ".join(items[:MOST_LINES]) + (f", and {rest:,} more" if rest > 0 else ""))


def _excerpt(text: str) -> str:
    return text if len(text) <= CHARACTERS else f"{text[:CHARACTERS]}…"
