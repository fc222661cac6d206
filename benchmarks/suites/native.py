"""The compiled step against transformers' modules in the same engine, and against plain transformers.

    python -m benchmarks native [--rounds 7] [--dtypes float32 bfloat16] [--only decode prompts busy speculation]

decode   seconds of a step that decodes one token of every row; what of it is not the compiled step; and, beside it, a
         plain read of as many bytes as the base has
prompts  new prompts until their first token
busy     16 rows through 16 adapters, alone and beside one endless loop
speculation  answers that repeat their prompt, and answers that do not, with and without speculative decoding

The base is SmolLM2-135M in float32, and also in bfloat16 if this CPU computes in it. Each system is a process of its
own, and they take turns.
"""

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.figures import PERCENT, Figure, Suite, Table
from benchmarks.harness import CPU, Run, parser
from benchmarks.models import SHAPES, random_store, save_random_base
from benchmarks.processes import take_turns, take_turns_beside_a_loop, worker
from benchmarks.systems import ANSWER, ROWS, STEPS, Case, EngineSystem, PlainRead, Speculation, Transformers
from loradeck import Base
from loradeck.base.load import SMOLLM2
from loradeck.dtypes import computes_in

ONE, BASE, MIXED, MANY, LONG = Case(1), Case(16), Case(16, 16), Case(64, 64), Case(16, prompt=1000)
PROMPTS = {"16 x 64": Case(16), "1 x 512": Case(1, prompt=512)}
COMPILED, EAGER, PLAIN = "compiled step", "enforce_eager", "transformers"
CASES = {COMPILED: (ONE, BASE, MIXED, MANY, LONG), EAGER: (ONE, BASE, MIXED, MANY, LONG), PLAIN: (ONE, BASE)}
READ = "plain read"
PARTS = ("decode", "prompts", "busy", "speculation")
DTYPES = ("float32", "bfloat16")
EMULATED = "bfloat16, emulated"

Rows = tuple[tuple[str, str, str, str, str], ...]
"""Key, label, unit, target in float32, target in bfloat16."""
RATIOS: Rows = (
    ("1 row / transformers", "1 row: tokens/s relative to transformers", "×", "≥ 2", "≥ 4"),
    ("16 rows / transformers", "16 rows on the base: tokens/s relative to transformers", "×", "", ""),
    ("16 adapters / transformers", "16 rows of 16 adapters: tokens/s relative to transformers on the base", "×",
     "≥ 2", ""),
    ("16 adapters / base", "16 rows of 16 adapters: time of a step relative to the base's", "×", "", "≤ 1.4"),
    ("64 / 16 adapters", "64 rows of 64 adapters: tokens/s relative to 16 rows of 16", "×", "≥ 1.5", "≥ 1.5"),
    ("plain read / step", "1 row: speed of reading the weights relative to a plain read", "×", "≥ 0.75", "≥ 0.75"),
    ("plain read / call", "the same, of the call into C alone", "×", "", ""),
    ("outside", "16 rows of 16 adapters: share of a step outside the call into C", PERCENT, "≤ 0.15", "≤ 0.15"),
)  # fmt: skip
FIRST_TOKENS: Rows = (
    ("transformers / compiled step, 16 x 64", "16 x 64 tokens: times faster than transformers", "×", "", "≥ 2.5"),
    ("transformers / compiled step, 1 x 512", "1 x 512 tokens: times faster than transformers", "×", "", "≥ 1.8"),
)
BESIDE: Rows = (
    ("compiled step, beside / alone", "compiled step: kept beside the loop", "×", "≥ 0.5", "≥ 0.5"),
    ("enforce_eager, beside / alone", "enforce_eager: kept beside the loop", "×", "", ""),
)


SPECULATION: Rows = (
    ("1 row, repeats", "1 row, an answer that repeats its prompt: tokens/s with drafts over without", "×", "", ""),
    ("1 row, plain", "1 row, a plain answer", "×", "", ""),
    ("1 row, drawn", "1 row, a plain answer at temperature 1", "×", "", ""),
    ("16 rows, plain", "16 rows, plain answers at temperature 1", "×", "", ""),
    ("accepted, repeats", "share of the drafts that is accepted: an answer that repeats its prompt", PERCENT, "", ""),
    ("accepted, plain", "a plain answer", PERCENT, "", ""),
)
PARAGRAPH = """\
The river Tarn rises in the hills above the town of Alden. In spring its water is high and brown, and the old mill by
the bridge stands with its feet in the flood. Miller Jonas Reed has kept the mill for forty years. He says that the
river talks at night, and that nobody who has slept beside it forgets the sound. Children come to fish from the wall,
and their mothers call them home when the bell of Saint Anne rings six times."""
REPEAT = f"Repeat the following text word for word:\n\n{PARAGRAPH}"
STORY = "Write a story about a lighthouse keeper and a storm."
ANSWERS = {
    "1 row, repeats": (REPEAT, 1, 0.0),
    "1 row, plain": (STORY, 1, 0.0),
    "1 row, drawn": (STORY, 1, 1.0),
    "16 rows, plain": (STORY, 16, 1.0),
}


def tables(kind: str) -> tuple[Table, ...]:
    """Return the tables of a base's dtype; one that is emulated has no targets."""

    def figures(rows: Rows) -> tuple[Figure, ...]:
        targets = {"float32": -2, "bfloat16": -1}
        return tuple(Figure(*row[:3], target=row[targets[kind]] if kind in targets else "") for row in rows)

    return (
        Table(f"Decoding in {kind}: ratios", (f"decode {kind}", "ratios", "{row}"), figures(RATIOS)),
        Table(f"Decoding in {kind}", (f"decode {kind}", "{column}", "{row}")),
        Table(f"Prompts in {kind}: time to the first token", (f"prompts {kind}", "{row}"), figures(FIRST_TOKENS)),
        Table(f"16 rows of 16 adapters in {kind}, beside one endless loop", (f"busy {kind}", "{row}"), figures(BESIDE)),
        Table(f"Speculative decoding in {kind}", (f"speculation {kind}", "{row}"), figures(SPECULATION)),
    )


SUITE = Suite(
    "native",
    "The compiled step",
    "SmolLM2-135M, r=8, all linear layers",
    tuple(table for kind in (*DTYPES, EMULATED) for table in tables(kind)),
    f"""
- *decoding*: prompts of 64 tokens unless the row says otherwise; then {STEPS} steps, of which those count that decode a
  token of every row. `compiled step` is the engine on weights in blocks, `enforce_eager` the engine whose steps are
  transformers' modules on packed weights, `transformers` plain `generate` on the base: it has no adapters.
- *a plain read*: a step of one row reads every weight once. torch reads a tensor of as many bytes, with as many
  threads, in the same run: by a sum in float32, a sum in int64, the largest int32, a dot product and a product of a
  matrix and a vector, of which the fastest counts. Its time over the step's is the figure.
- *outside the call into C*: the rest of the time from one step's start to the next one's: the scheduler, the arguments
  of the call, sampling, text.
- *prompts*: new ones each time. The engine from the call of `generate` until all rows have a token; transformers from
  the call of its forward pass to the last logits.
- *beside one endless loop*: tokens per second beside a process that only loops, over those alone.
- *speculative decoding*: prompt lookup at its defaults over none, the same answers of {ANSWER} tokens at most.
  In the other tables it is off.
""",
)


def main(arguments: Sequence[str]) -> None:
    options = parser(SUITE, __doc__, rounds=7, parts=PARTS, dtypes=DTYPES)
    options.set_defaults(dtypes=[*DTYPES] if computes_in(torch.bfloat16, CPU) else ["float32"])
    options.add_argument("--shape", choices=SHAPES, help="a base of random weights instead; no file is written")
    run = Run(SUITE, options, arguments)
    run.options.record &= not run.options.shape
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        source = save_random_base(run.options.shape, folder / "base") if run.options.shape else SMOLLM2
        for dtype in run.options.dtypes:
            if {*run.options.only} != {"speculation"}:
                measure(run, source, dtype, folder / dtype)
            if "speculation" in run.options.only:
                run.add(f"speculation {kind_of(dtype)}", speculation(dtype, run.options.rounds))
    run.end()


def kind_of(dtype: str) -> str:
    """Return what the tables call a dtype."""
    return dtype if computes_in(getattr(torch, dtype), CPU) else f"{dtype}, emulated"


def measure(run: Run, source: str | Path, dtype: str, folder: Path) -> None:
    """Add the figures of a base in a dtype; its adapters are stored in a folder."""
    kind = kind_of(dtype)
    base = Base.load(source, dtype=dtype)
    nbytes = sum(parameter.nbytes for parameter in base.model.parameters())
    random_store(base.model, folder, count=ROWS, r=8, dtype=base.model.dtype)
    del base
    only, rounds = run.options.only, run.options.rounds
    with ExitStack() as running:
        systems: dict[str, Callable[..., Any]] = {
            COMPILED: running.enter_context(worker(EngineSystem, source, dtype, folder, False)),
            EAGER: running.enter_context(worker(EngineSystem, source, dtype, folder, True)),
            PLAIN: running.enter_context(worker(Transformers, source, dtype)),
        }
        if "decode" in only:
            read = running.enter_context(worker(PlainRead, nbytes))
            run.add(f"decode {kind}", decode(systems, read, rounds))
        if "prompts" in only:
            run.add(f"prompts {kind}", prompts(systems, rounds))
        if "busy" in only:
            run.add(f"busy {kind}", busy(systems, rounds))


def decode(
    systems: Mapping[str, Callable[..., Any]], read: Callable[[], float], rounds: int
) -> dict[str, dict[str, float]]:
    """Return each system's tokens per second, and the ratios."""
    turns: dict[tuple[str, Case | None], Callable[[], Any]] = {
        (name, case): partial(systems[name], "decode", case) for name, cases in CASES.items() for case in cases
    }
    turns[READ, None] = read
    for turn in turns.values():
        turn()  # packs, compiles, and keeps the prompts
    results = take_turns(turns, rounds)
    plain_read = statistics.median(results[READ, None])
    step = {name: {case: median_of(results[name, case], 0) for case in cases} for name, cases in CASES.items()}
    ours, plain = step[COMPILED], step[PLAIN]
    ratios = {
        "1 row / transformers": plain[ONE] / ours[ONE],
        "16 rows / transformers": plain[BASE] / ours[BASE],
        "16 adapters / transformers": plain[BASE] / ours[MIXED],
        "16 adapters / base": ours[MIXED] / ours[BASE],
        "64 / 16 adapters": MANY.rows / ours[MANY] / (MIXED.rows / ours[MIXED]),
        "plain read / step": plain_read / ours[ONE],
        "plain read / call": plain_read / median_of(results[COMPILED, ONE], 1),
        "outside": statistics.median(1 - call / whole for whole, call in results[COMPILED, MIXED]),
    }
    return {"ratios": ratios} | {
        name: {f"{case} (tokens/s)": case.rows / each for case, each in own.items()} for name, own in step.items()
    }


def prompts(systems: Mapping[str, Callable[..., Any]], rounds: int) -> dict[str, float]:
    """Return the milliseconds to the first token of all rows."""
    figures: dict[str, float] = {}
    for name, case in PROMPTS.items():
        turns = {system: partial(systems[system], "first_token", case) for system in (COMPILED, PLAIN)}
        take_turns(turns, 1)
        times = {system: statistics.median(each) for system, each in take_turns(turns, rounds).items()}
        figures |= {f"{system}, {name} (ms)": 1e3 * each for system, each in times.items()}
        figures[f"transformers / compiled step, {name}"] = times[PLAIN] / times[COMPILED]
    return figures


def busy(systems: Mapping[str, Callable[..., Any]], rounds: int) -> dict[str, float]:
    """Return the tokens per second alone and beside an endless loop."""
    turns = {name: partial(systems[name], "decode", MIXED) for name in (COMPILED, EAGER)}
    take_turns(turns, 1)
    alone, beside = take_turns_beside_a_loop(turns, rounds)
    figures: dict[str, float] = {}
    for name in turns:
        rates = [MIXED.rows / median_of(results[name], 0) for results in (alone, beside)]
        figures |= {f"{name}, alone (tokens/s)": rates[0], f"{name}, beside the loop (tokens/s)": rates[1]}
        figures[f"{name}, beside / alone"] = rates[1] / rates[0]
    return figures


def speculation(dtype: str, rounds: int) -> dict[str, float]:
    """Return the speed with drafts over that without them, and how many drafts are accepted."""
    with worker(Speculation, SMOLLM2, dtype, True) as drafting, worker(Speculation, SMOLLM2, dtype, False) as plain:
        turns = {
            (name, drafts): partial(system, *answer)
            for name, answer in ANSWERS.items()
            for drafts, system in ((True, drafting), (False, plain))
        }
        take_turns(turns, 1)
        results = take_turns(turns, rounds)
    figures = {name: median_of(results[name, True], 0) / median_of(results[name, False], 0) for name in ANSWERS}
    accepted = {name: median_of(results[f"1 row, {name}", True], 1) for name in ("repeats", "plain")}
    return figures | {f"accepted, {name}": share for name, share in accepted.items()}


def median_of(results: Sequence[tuple[float, float]], place: int) -> float:
    return statistics.median(each[place] for each in results)
