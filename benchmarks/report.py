"""Writes docs/benchmarks.md, and the table in the README, from the result files; no figure is typed by hand.

python -m benchmarks.report [--check]
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import grids, quality_page

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- benchmarks: written by `python -m benchmarks.report` -->", "<!-- /benchmarks -->"

DEMO = ("<!-- demo: written by `python -m benchmarks.report` -->", "<!-- /demo -->")


@dataclass(frozen=True)
class Suite:
    """One result file, what is asked of it, and how to read it."""

    name: str
    title: str
    head: str
    targets: tuple[tuple[str, str, str, str], ...]
    """(part, key, what it is, target as text)."""
    notes: tuple[str, ...]


ADAPTERS = Suite(
    "adapters",
    "Adapters",
    "SmolLM2-135M, r=8, all linear layers (210 modules)",
    (
        ("load", "PEFT / loradeck", "load from disk, PEFT's time over ours", "≥ 30"),
        ("load", "200 resident / 1 resident", "load with 200 resident, over with 1", "≤ 1.2"),
        ("load", "loradeck / read", "load, over reading the file's bytes", "2 (goal)"),
        ("load", "switch, 200 resident, 16 rows of 16 (us)", "switch: a new route, 16 rows, 200 resident, µs", "< 100"),
        ("memory float32", "added per adapter / its bytes", "memory per float32 adapter, over its bytes", "≤ 1.05"),
        ("memory bfloat16", "added per adapter / its bytes", "memory per bfloat16 adapter, over its bytes", "≤ 1.05"),
        ("step float32", "PEFT / loradeck, 16 adapters", "mixed decode step, float32, PEFT's time over ours", "≥ 4"),
        ("step bfloat16", "PEFT / loradeck, 16 adapters", "mixed decode step, bfloat16, PEFT's time over ours", "≥ 4"),
        ("step float32", "16 adapters / bare", "mixed step over the bare model's, float32", "≤ 1.6"),
        ("step bfloat16", "16 adapters / bare", "mixed step over the bare model's, bfloat16", "≤ 1.6"),
        ("step float32", "base rows / bare", "base-only rows over the bare model's, float32", "≤ 1.02"),
        ("step bfloat16", "base rows / bare", "base-only rows over the bare model's, bfloat16", "≤ 1.02"),
    ),
    (
        "- *load*: a PEFT folder on disk (page cache warm) until it can be routed to. PEFT loads with one adapter",
        "  resident, its best case. *read the bytes* keeps what it read in memory, as a load must.",
        "- *step*: 16 rows, 64 tokens of context, one new token each. PEFT's mixed batch is `adapter_names`.",
        "- *first step after a switch*: a route to adapters that were not routed together finds all their tensors.",
    ),
)
TRAIN = Suite(
    "train",
    "Training",
    "SmolLM2-135M, r=16, all linear layers, ragged examples with the prompt masked",
    (
        ("speed float32", "loradeck / PEFT, transformers' Trainer", "tokens/s over PEFT + Trainer's, float32", "≥ 2"),
        ("speed bfloat16", "loradeck / PEFT, transformers' Trainer", "tokens/s over PEFT + Trainer's, bfloat16", "≥ 2"),
        ("speed float32", "loradeck / PEFT, plain loop", "tokens/s over PEFT's in a plain loop, float32", ""),
        ("speed bfloat16", "loradeck / PEFT, plain loop", "tokens/s over PEFT's in a plain loop, bfloat16", ""),
        (
            "memory float32",
            "loradeck / PEFT, transformers' Trainer",
            "peak memory over PEFT + Trainer's, float32",
            "≤ 0.5",
        ),
        (
            "memory bfloat16",
            "loradeck / PEFT, transformers' Trainer",
            "peak memory over PEFT + Trainer's, bfloat16",
            "≤ 0.5",
        ),
        ("8 jobs, 4 sequences a step each", "8 jobs / one job", "8 jobs over one job, 4 sequences each", "≤ 1.15"),
        ("8 jobs, 1 sequences a step each", "8 jobs / one job", "8 jobs over one job, 1 sequence each", "≤ 1.15"),
        ("start", "process to first step (s)", "process start to the first step, s", "< 5"),
    ),
    (
        "- *speed*: real tokens per second, padding not counted. The systems take turns after each step, on the same",
        "  examples from the same adapter, and their losses are asserted to be equal to 1e-3.",
        "- *memory*: the kernel's high-water mark over that with base and adapter loaded, a process for each system.",
        "- *8 jobs*: an optimizer step of 8 jobs in one pass, over one job's step on the same sequences. PEFT's 8 runs",
        "  are 8 steps of its plain loop, one after the other.",
    ),
)
SERVE = Suite(
    "serve",
    "Serving",
    "SmolLM2-135M, 16 rows, r=8, all linear layers",
    (
        (
            "streams bfloat16",
            "distinct / base",
            "16 different adapters, tokens/s over the same streams on the base, bfloat16",
            "≥ 0.7",
        ),
        ("streams float32", "distinct / base", "the same, float32", "≥ 0.7"),
        (
            "streams bfloat16",
            "loradeck / PEFT, distinct",
            "16 different adapters, tokens/s over PEFT's, bfloat16",
            "≥ 6",
        ),
        ("streams float32", "loradeck / PEFT, distinct", "the same, float32", "≥ 6"),
        ("streams bfloat16", "of it outside the model", "a 16-row step's time outside the model's forward", "< 0.1"),
        (
            "prefill bfloat16",
            "16 x 64: transformers / loradeck, distinct",
            "first token of 16 prompts of 64, 16 adapters, transformers' time on the base over ours, bfloat16",
            "≥ 1.5",
        ),
        (
            "prefill bfloat16",
            "1 x 512: transformers / loradeck, distinct",
            "first token of a prompt of 512 through an adapter, transformers' time on the base over ours, bfloat16",
            "≥ 1.5",
        ),
        ("prefill float32", "16 x 64: transformers / loradeck, distinct", "16 x 64, the same, float32", "≥ 1.5"),
        ("prefill float32", "1 x 512: transformers / loradeck, distinct", "1 x 512, the same, float32", "≥ 1.5"),
        ("registered", "2,000 / 5", "tokens/s with 2,000 adapters registered over with 5", "≥ 0.95"),
        ("crowded", "half / all resident", "time to first token, half of the adapters fit, over all resident", "≤ 3"),
        ("cold", "cold - warm (ms)", "first token of an adapter on disk later than of a resident one, ms", "≤ 50"),
    ),
    (
        "- *streams*: 64 tokens of prompt and 32 of answer, all at once; tokens of answers per second;",
        "  workloads as Punica's. PEFT: transformers' `generate` with `adapter_names`, in a process of its own.",
        "- *prefill*: new prompts each time; transformers' `generate` of one token, in the same process as PEFT's.",
        "- *registered*: S-LoRA's question, scaled down: the same Gamma arrivals, adapters of r=4 drawn evenly from",
        "  5 or from 2,000 in the store; with 2,000, most requests are the first to their adapter.",
        "- *crowded*: 32 adapters in use, with room for all and with room for 16; 1.2 requests a second.",
        "- *cold*: the file is in the page cache of the operating system.",
    ),
)
SOAK = Suite(
    "soak",
    "Soak",
    "SmolLM2-135M, float32, everything at random",
    tuple(
        (part, key, f"{what}, {way}", target)
        for key, what, target in (
            ("adapters in the store", "adapters in the store", "2,000"),
            ("finished", "requests that were answered whole", ""),
            ("lost requests", "requests that were lost", "0"),
            ("tokens judged", "tokens held against the request alone", ""),
            ("wrong tokens", "of these wrong", "0"),
            ("memory at the end / after warm-up", "resident memory at the end, over after warm-up", "≤ 1.05"),
        )
        for part, way in (("engine", "engine"), ("http", "server"))
    ),
    (
        "- Clients ask for adapters (Zipf 1.5), versions, scales, blends of three and the base, greedily and with",
        "  seeds, with prompts that share their beginnings, and some go away in the middle; adapters are loaded,",
        "  unloaded and published by hand meanwhile. There is room for sixteen adapters. Each has weights of its own.",
        "- *wrong*: not the likeliest token of one plain forward through the request's own adapters, or, of one that",
        "  was drawn, not the one in whose share its seed's number lies; forgiven within 1e-3 of log-probability or",
        "  share. A log-probability that is told is wrong beyond 1e-3 too. What is further off, up to 0.1, is held",
        "  against its rounding: four times as far as embeddings carry that are moved by their last bit. What was",
        "  left is judged as far as it came.",
        "- *judged by a wrong adapter*: a fifth of the answers, to see that a leak would be found.",
        "- *server*: a `loradeck serve` process, openai's client, and SIGTERM while it answers. *loads by hand without",
        "  room*: all adapters were in use, and the load was refused.",
        "- *after warm-up*: a quarter of the time. Figures around a moment are means of a tenth of the time.",
    ),
)
GPU = Suite(
    "gpu",
    "GPU",
    "Llama-3.1-8B's shape, random weights, 32 rows, r=16, all linear layers, one GPU",
    (
        ("decode Llama-3.1-8B", "32 adapters / base", "decode step, 32 different adapters over the base", "≤ 1.15"),
        ("decode Llama-3.1-8B", "PEFT / loradeck, 32 adapters", "the same step, PEFT's time over ours", "≥ 10"),
        ("load Llama-3.1-8B", "loradeck (ms)", "load from disk to the GPU, ms", "< 20"),
        ("train Llama-3.1-8B", "PEFT / loradeck, time of a step", "training step, PEFT's time over ours", ""),
    ),
    (
        "- *operation*: each way's largest error against float64, of the output's largest value.",
        "- *ways*: 32 rows of 32 adapters at one layer. *triton* are the kernels of `ops/triton.py`.",
        "- *decode*: 128 tokens of context, one new token each; transformers' model without CUDA graphs.",
        "- *train*: 4 sequences of 512 tokens, in bfloat16; PEFT in a plain loop.",
    ),
)
EMULATED = Suite(
    "emulated",
    "Half precision where it is emulated",
    "SmolLM2-135M in bfloat16 on a CPU without arithmetic for it",
    (
        ("training", "plain / packed", "training step, plain weights' time over packed weights'", "≥ 1.3"),
        ("forward passes", "prefill, 1 x 512; plain / packed", "prompt of 512 tokens, the same", ""),
        ("forward passes", "prefill, 16 x 64; plain / packed", "16 prompts of 64 tokens, the same", ""),
        ("forward passes", "decode, 16 rows; plain / packed", "decode step, 16 rows, the same", ""),
        ("forward passes", "decode, 1 row; plain / packed", "decode step, 1 row, the same", ""),
    ),
    (
        "- *training*: r=16 on all linear layers, two sequences a step; the steps take turns. *loss off float32's*:",
        "  over the same steps with a base in float32.",
        "- *forward passes*: plain transformers, no adapters. Packed weights are here ours, multiplied in float32.",
    ),
)
SUITES = (ADAPTERS, TRAIN, SERVE, SOAK, EMULATED, GPU)
NO_GPU = "No figure here is of a GPU: none was at hand. `python -m benchmarks.gpu` measures one, where there is one."


def main() -> None:
    records = {suite: result(suite.name) for suite in SUITES if results(suite.name).exists()}
    demo = (ROOT / "benchmarks" / "results" / "demo.txt").read_text(encoding="utf-8")
    demo = demo[demo.index("3. Back from disk") : demo.index("What to try next")]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    measured = [summary(suite, record) for suite, record in records.items() if suite not in (SOAK, EMULATED)]
    readme = between(readme, BEGIN, END, "\n\n".join([*measured, *no_gpu(records)]))
    readme = between(readme, *DEMO, f"```text\n{demo.strip()}\n```")
    pages = {
        ROOT / "README.md": readme,
        ROOT / "docs" / "benchmarks.md": page(records),
        ROOT / "docs" / "quality.md": quality_page.page(result("quality")),
    }
    stale = [path.name for path, text in pages.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if "--check" in sys.argv:
        sys.exit(f"stale: {', '.join(stale)}; run python -m benchmarks.report" if stale else 0)
    for path, text in pages.items():
        path.write_text(text, encoding="utf-8")


def results(name: str) -> Path:
    return ROOT / "benchmarks" / "results" / f"{name}.json"


def result(name: str) -> dict[str, Any]:
    return json.loads(results(name).read_text(encoding="utf-8"))


def between(text: str, begin: str, end: str, content: str) -> str:
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{content}\n{end}{after}"


def summary(suite: Suite, record: dict[str, Any]) -> str:
    rows = [
        f"| {what} | {figure(record['figures'][part][key])} | {target} |"
        for part, key, what, target in suite.targets
        if key in record["figures"].get(part, ())  # PEFT is not on every machine with a GPU
    ]
    return "\n".join([f"| {suite.head} | measured | target |", "|---|---|---|", *rows])


def no_gpu(records: dict[Suite, dict[str, Any]]) -> list[str]:
    return [] if GPU in records else [NO_GPU]


def page(records: dict[Suite, dict[str, Any]]) -> str:
    lines = [
        "# Benchmarks",
        "",
        "Written by `python -m benchmarks.report` from `benchmarks/results/`, which `make bench` makes. Medians; the",
        "systems take turns in one run, so compare figures within a table only. The machine is shared and noisy.",
    ]
    for suite, record in records.items():
        versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
        lines += [
            "",
            f"## {suite.title}",
            "",
            f"`python -m benchmarks.{suite.name}`. Machine: {record['machine']}. Versions: {versions}. "
            f"Commit: {record['commit']}.",
            "",
            summary(suite, record),
            "",
            *suite.notes,
        ]
        for part, figures in record["figures"].items():
            lines += ["", f"### {part}", "", "| | |", "|---|---|"]
            lines += [f"| {name} | {figure(value)} |" for name, value in figures.items()]
    for text in no_gpu(records):
        lines += ["", f"## {GPU.title}", "", text]
    lines += [line for grid in grids.GRIDS if grid.path.exists() for line in grid.section()]
    return "\n".join([*lines, ""])


def figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


if __name__ == "__main__":
    main()
