from collections.abc import Mapping, Sequence
from io import StringIO
from typing import Any

import msgspec
import pytest
from rich.console import Console
from rich.text import Text

from loradeck.cli.display import live_view as module
from loradeck.cli.display.live_view import plan_table, progress, view
from loradeck.cli.display.progress_state import ProgressState
from loradeck.train.events import AnyEvent, End, Evaluation, Sample, Step
from loradeck.train.plan import Plan
from loradeck.train.schedule import Schedule


def step(number: int, job: str = "poet", **changes: Any) -> Step:
    event = Step(
        job=job,
        step=number,
        seconds=2.0 * number,
        took=2.0,
        steps=100,
        loss=4.0 / number,
        learning_rate=3e-4,
        grad_norm=1.0,
        tokens=1000 * number,
        supervised=10,
        memory=2_500_000_000,
    )
    return msgspec.structs.replace(event, **changes)


def evaluation(number: int, loss: float, *, best: bool, **more: float) -> Evaluation:
    return Evaluation(job="poet", step=number, seconds=2.0 * number, loss=loss, tokens=7, best=best, **more)


END = End(job="poet", step=60, seconds=121.0, reason="early stop", kept=40, detail="no better for 2 evaluations")
SAMPLE = Sample(
    job="poet", step=40, seconds=80.0, prompt="Hi [red]you\x1b[2J", expected="Ahoy\r", answer="Aye\nsea\x07"
)


def rendered(state: ProgressState, width: int = 110, most: int | None = None) -> list[str]:
    console = Console(file=StringIO(), width=width, record=True)
    console.print(view(state, most))
    return [line.rstrip() for line in console.export_text().splitlines()]


def output(events: Sequence[AnyEvent], jobs: Mapping[str, int] | None = None, **options: Any) -> str:
    """Return the output of a console for these events."""
    file = StringIO()
    console = Console(file=file, width=100, height=12, color_system=None, _environ={}, **options)
    with progress(console, jobs) as listen:
        for event in events:
            listen(event)
    return file.getvalue()


def test_a_job_is_a_line() -> None:
    state = ProgressState({"poet": 100, "judge": 30})
    for number, took in ((1, 2.0), (2, 2.0), (4, 4.0)):
        state.update(step(number, took=took))
    state.update(evaluation(4, 1.25, best=True))
    head, poet, judge, totals = rendered(state)
    assert head.split() == ["job", "step", "loss", "validation", "rate", "tokens/s", "left"]
    assert poet.split() == ["poet", "4/100", "█▃▁", "1.000", "1.250", "★", "0.0003", "500", "0:03:12"]
    assert judge.split() == ["judge", "0/30", "waiting"]
    assert totals == "500 tokens/s · memory 2.50 GB, peak 2.50 GB · 0:00:08"


def test_only_the_best_evaluation_has_a_star() -> None:
    state = ProgressState()
    state.update(evaluation(4, 1.25, best=True))
    state.update(evaluation(5, 1.5, best=False))
    assert "1.500" in rendered(state)[1]
    assert "★" not in rendered(state)[1]


def test_a_job_that_ended_shows_the_reason() -> None:
    state = ProgressState()
    state.update(step(60))
    state.update(END)
    assert rendered(state)[1].endswith("early stop, kept 40")


def test_preferences_show_their_accuracy_and_margin_by_name() -> None:
    state = ProgressState()
    state.update(step(4, accuracy=0.75, margin=2.125))
    head, row, _ = rendered(state)
    assert head.split() == ["job", "step", "loss", "validation", "accuracy", "margin", "rate", "tokens/s", "left"]
    assert "1.000                   75%     2.1  0.0003" in row
    lines = output([step(1, accuracy=0.75, margin=2.125), evaluation(1, 1.5, best=True, accuracy=1.0, margin=-0.25)])
    assert "loss 4.000 · accuracy 75%, margin 2.1" in lines
    assert "validation loss 1.500, best so far · accuracy 100%, margin -0.2" in lines


def test_running_jobs_are_shown_first() -> None:
    state = ProgressState({f"job-{number}": 9 for number in range(50)})
    state.update(step(1, "job-40"))
    lines = rendered(state, most=3)
    assert [line.split()[0] for line in lines[1:4]] == ["job-40", "job-0", "job-1"]
    assert lines[4] == "and 47 more"


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_the_bars_fit_the_width(width: int) -> None:
    state = ProgressState()
    for number in range(1, 51):
        state.update(step(number))
    lines = rendered(state, width)
    assert len(lines) == 3
    assert max(map(len, lines[:2])) <= width


@pytest.mark.parametrize("width", [30, 40, 60, 80, 120])
@pytest.mark.parametrize("preferences", [False, True])
def test_a_narrow_table_leaves_columns_out_and_breaks_no_number(width: int, preferences: bool) -> None:
    state = ProgressState({"a-name-that-is-long": 123_456})
    more = {"accuracy": 0.97, "margin": 12.3} if preferences else {}
    for number in (88_888, 88_889):
        event = step(number, "a-name-that-is-long", steps=123_456, learning_rate=1.25e-4, **more)
        state.update(event)
    state.update(msgspec.structs.replace(evaluation(88_889, 11.125, best=True), job="a-name-that-is-long"))
    head, row, *_ = rendered(state, width)
    assert max(len(head), len(row)) <= width
    whole = {"88889/123456", "0.000", "11.125", "★", "0.00013", "500", "19:12:14", "97%", "12.3"}
    assert {cell for cell in row.split() if not cell.startswith("a-name")} - set("▁▂▃▄▅▆▇█") <= whole | {"█▁"}
    assert "88889/123456" in row
    assert "0.000" in row
    assert width < 120 or head.split()[-4:-1] == ["margin" if preferences else "validation", "rate", "tokens/s"]


def test_the_last_drawing_shows_every_job() -> None:
    jobs = {f"job-{number}": 9 for number in range(30)}
    out = output([step(1), step(2), END], jobs, force_terminal=True)
    live, last = out[: out.rindex("\x1b[1A")], out[out.rindex("\x1b[1A") :]
    assert "and 21 more" in live
    assert all(job in last for job in jobs)
    assert "early stop, kept 40" in last
    assert "poet: early stop: no better for 2 evaluations" in live


def test_drawing_leaves_time_for_training(monkeypatch: pytest.MonkeyPatch) -> None:
    first, at_the_end = (0.0, 0.001), (9.0, 9.1)
    heard = {
        (0.2,): False,  # less than a quarter of a second after the first drawing
        (0.25,): False,
        (0.27, 0.30, 0.34): True,  # a drawing of 40 ms, so none for 4 s
        (4.33,): False,
        (4.35, 4.40, 4.41): True,
    }
    clock = iter([*first, *(time for times in heard for time in times), *at_the_end])
    monkeypatch.setattr(module, "perf_counter", lambda: next(clock))
    file = StringIO()
    drawn = []
    with progress(Console(file=file, force_terminal=True, width=100, _environ={})) as listen:
        for number in range(1, len(heard) + 1):
            before = len(file.getvalue())
            listen(step(number))
            drawn.append(len(file.getvalue()) > before)
    assert drawn == list(heard.values())
    assert next(clock, None) is None


def test_a_sample_stays_above_and_cannot_steer_the_terminal() -> None:
    out = output([step(1), SAMPLE], force_terminal=True)
    above = out[out.index("poet, step 40") :]
    assert "prompt    Hi [red]you�[2J" in above
    assert "expected  Ahoy�" in above
    assert "answer    Aye" in above
    assert "\x1b[2J" not in out
    assert "\x07" not in out


def test_without_a_terminal_a_job_prints_about_ten_lines() -> None:
    lines = output([step(number) for number in range(1, 101)]).splitlines()
    assert len(lines) == 11
    assert lines[0] == "poet: step 1/100 · loss 4.000"
    assert lines[1] == "poet: step 10/100 · loss 0.400 · 500 tokens/s · 0:03:00 left"
    assert lines[-1].startswith("poet: step 100/100")


@pytest.mark.parametrize("steps", [1, 2, 9, 15, 99, 1001])
def test_a_run_of_any_length_has_its_first_and_last_line(steps: int) -> None:
    lines = output([step(number, steps=steps) for number in range(1, steps + 1)]).splitlines()
    assert lines[0].startswith(f"poet: step 1/{steps} ")
    assert lines[-1].startswith(f"poet: step {steps}/{steps} ")
    assert min(steps, 8) <= len(lines) <= 12


def test_without_a_terminal_each_evaluation_and_end_is_a_line() -> None:
    assert output([evaluation(3, 1.5, best=True), evaluation(4, 1.6, best=False), SAMPLE, END]).splitlines() == [
        "poet: step 3 · validation loss 1.500, best so far",
        "poet: step 4 · validation loss 1.600",
        "poet: early stop after step 60 · kept step 40 · no better for 2 evaluations",
    ]


def test_a_dumb_terminal_gets_lines() -> None:
    file = StringIO()
    with progress(Console(file=file, force_terminal=True, _environ={"TERM": "dumb"})) as listen:
        listen(step(1))
    assert Text.from_ansi(file.getvalue()).plain.strip() == "poet: step 1/100 · loss 4.000"


def test_the_cursor_is_restored_after_an_error() -> None:
    file = StringIO()
    console = Console(file=file, force_terminal=True, width=100, _environ={})
    with pytest.raises(RuntimeError, match="memory"), progress(console):
        raise RuntimeError("out of memory")
    assert file.getvalue().rstrip().endswith("\x1b[?25h")  # the cursor is back


def test_a_plan_shows_its_sizes_and_reasons() -> None:
    plan = Plan(
        name="poet",
        trainable=1200,
        adapter_bytes=5_000_000,
        base_bytes=500_000_000,
        form="messages",
        examples=1234,
        valid=56,
        truncated=7,
        tokens=9999,
        supervised=777,
        longest=321,
        batch_size=8,
        schedule=Schedule(steps=155, peak=3e-4, reason="as given", warmup=16, decay="linear"),
        settings={"r": ("16", "room enough"), "target_modules": ("\x1b[2Jq_proj", "as given")},
        first=[("[bold]Hi\x1b[2J", False), ("Ahoy", True)],
    )
    console = Console(file=StringIO(), width=110, record=True)
    console.print(plan_table(plan))
    text = console.export_text()
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "adapter poet: 1,200 parameters, 5.0 MB: 1.0% of the base's 500 MB" in lines
    assert "examples 1,234 (messages), at most 321 tokens, 7 truncated; 56 for validation" in lines
    assert "tokens 9,999 per epoch, of which 777 are learned" in lines
    assert "steps 155 of 8 examples" in lines
    assert "learning rate 0.0003, linear after 16 steps of warm-up (as given)" in lines
    assert "r 16 room enough" in lines
    assert "read [bold]Hi�[2J" in lines
    assert "learned Ahoy" in lines
    assert "\x1b" not in text
