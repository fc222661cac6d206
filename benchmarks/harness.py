"""How suites are run: their options, runs that alternate, and a record of machine, versions and commit."""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch

from benchmarks.figures import Suite
from benchmarks.models import LLAMAS, SHAPES
from loradeck.dtypes import computes_in

P = ParamSpec("P")
T = TypeVar("T")

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("loradeck", "torch", "transformers", "peft")
CPU = torch.device("cpu")
# Result files, and the pages and pictures made from them, change while suites are run one after the other.
GENERATED = ("benchmarks/results/", "README.md", "docs/benchmarks.md", "docs/quality.md", "docs/peers.svg",
             "docs/quality.svg")  # fmt: skip


# ---- options


def parser(
    suite: Suite,
    description: str | None,
    *,
    rounds: int | None = None,
    parts: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    shapes: bool = False,
) -> argparse.ArgumentParser:
    """Return a parser with the options that suites share; `shapes` adds --device and --shape."""
    options = argparse.ArgumentParser(
        prog=f"python -m benchmarks {suite.name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument("--no-record", dest="record", action="store_false", help="print the figures, write no file")
    if rounds:
        options.add_argument("--rounds", type=int, default=rounds)
    if parts:
        options.add_argument("--only", nargs="+", choices=parts, default=[*parts])
    if dtypes:
        options.add_argument("--dtypes", nargs="+", choices=dtypes, default=[*dtypes])
    if shapes:
        options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
        options.add_argument(
            "--shape", nargs="+", choices=SHAPES, default=[], help="bases of random weights; on cuda: both Llamas"
        )
    return options


class Run:
    """One run of a suite: it shows each part's figures, and records them at the end."""

    def __init__(self, suite: Suite, parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
        """Parse the arguments.

        Raises:
            SystemExit: there is no such device, or the figures could not be recorded.
        """
        self.suite = suite
        self.options = parser.parse_args(arguments)
        self.device = CPU
        self.figures: dict[str, Any] = {}
        if getattr(self.options, "device", "cpu") == "cuda":
            if not torch.cuda.is_available():
                sys.exit(f"benchmarks: torch {torch.__version__} finds no CUDA device; nothing was measured.")
            self.device = torch.device("cuda", 0)
            self.options.shape = self.options.shape or [*LLAMAS]
        self.partial = any(
            getattr(self.options, name, None) != parser.get_default(name) for name in ("only", "dtypes", "files")
        )
        if self.options.record and (reason := why_not_recorded()):
            sys.exit(f"benchmarks: {reason}\nCommit first, or print the figures only: --no-record.")

    def add(self, part: str, figures: Mapping[str, Any]) -> None:
        """Show a part's figures and keep them, with six digits."""
        self.figures[part] = rounded(figures)
        self.suite.cells({part: self.figures[part]})  # fails for a figure that is not declared
        print(f"\n{part}\n{json.dumps(self.figures[part], indent=2, ensure_ascii=False)}", flush=True)

    def end(self, versions: Mapping[str, str] | None = None) -> None:
        """Record the figures; `versions` are those of other systems.

        A run of some parts only adds to a record of the same machine, versions and commit.
        """
        if not self.options.record:
            return
        record = provenance(self.suite, self.device, versions)
        if self.partial:
            path = result_path(self.suite, self.device)
            before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            if {key: before.get(key) for key in record} != record:
                print(f"not recorded: some parts only, and {path.name} is of another machine, version or commit")
                return
            self.figures = before["figures"] | self.figures
        write(self.suite, self.figures, self.device, versions)


def rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: rounded(each) for key, each in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


def in_new_process(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function in a process of its own: memory that was freed before would hide what it takes."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *args, **kwargs).result()


# ---- time


def seconds(run: Callable[[], object], device: torch.device = CPU) -> float:
    """Return how long one call takes, with what it leaves running on a GPU."""
    synchronise(device)
    start = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - start


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def alternate(
    runs: Mapping[str, Callable[[], object]], rounds: int, *, device: torch.device = CPU, patience: float = 0.0
) -> dict[str, float]:
    """Return each run's median seconds. The runs alternate, so that a noisy machine is noisy for all.

    With `patience`, a round in which other processes used the machine does not count and is repeated, until that many
    seconds have passed; if fewer than three rounds were quiet by then, all count. Needs Linux.
    """
    quiet: dict[str, list[float]] = {name: [] for name in runs}
    noisy: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    end = time.monotonic() + patience
    done = 0
    while done < rounds and (not patience or time.monotonic() < end):
        others, begin = _others(), time.perf_counter()
        times = {name: seconds(run, device) for name, run in runs.items()}
        share = (_others() - others) / (time.perf_counter() - begin + 0.2)
        is_quiet = not patience or share <= 0.1
        for name, each in times.items():
            (quiet if is_quiet else noisy)[name].append(each)
        done += is_quiet
    least = min(3, rounds)
    return {
        name: statistics.median(times if len(times) >= least else [*times, *noisy[name]])
        for name, times in quiet.items()
    }


def _others() -> float:
    """Return the seconds that cores have spent on other processes than this one since the machine started."""
    try:
        user, nice, system, _, _, interrupts, soft, stolen = map(int, Path("/proc/stat").read_text().split()[1:9])
    except OSError:
        return 0.0
    return (user + nice + system + interrupts + soft + stolen) / os.sysconf("SC_CLK_TCK") - time.process_time()


# ---- records


def write(
    suite: Suite, figures: Mapping[str, Any], device: torch.device = CPU, versions: Mapping[str, str] | None = None
) -> None:
    """Write a suite's result file for this machine.

    Raises:
        SystemExit: there are changes that are not committed.
    """
    if reason := why_not_recorded():
        sys.exit(f"benchmarks: {reason}\nCommit first, or print the figures only: --no-record.")
    path = result_path(suite, device)
    path.parent.mkdir(exist_ok=True)
    record = provenance(suite, device, versions) | {"figures": figures}
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"written: {path}", flush=True)


def result_path(suite: Suite, device: torch.device = CPU) -> Path:
    return RESULTS / (f"{suite.name}.{capability(device)}.json" if suite.by_capability else f"{suite.name}.json")


def capability(device: torch.device = CPU) -> str:
    """Return what the processor can do, as it stands in file names: avx2, avx512, avx512_bf16, sm_90."""
    if device.type == "cuda":
        return "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    return torch.backends.cpu.get_cpu_capability().lower() + "_bf16" * computes_in(torch.bfloat16, CPU)


def provenance(suite: Suite, device: torch.device = CPU, versions: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return what a result file says beside its figures."""
    card = f"{torch.cuda.get_device_name(device)}; " if device.type == "cuda" else ""
    return {
        "benchmark": suite.name,
        "commit": _git("rev-parse", "--short", "HEAD").strip(),
        "machine": f"{card}{_processor()}, {os.cpu_count()} cores, {platform.system()}",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "bfloat16_arithmetic": computes_in(torch.bfloat16, device),
        "versions": {package: version(package) for package in PACKAGES if find_spec(package)} | dict(versions or {}),
    }


def why_not_recorded() -> str | None:
    """Say why figures measured now could not be recorded; None if they can be: a commit holds the code they are of."""
    try:
        status = _git("status", "--porcelain", "--untracked-files=all")
    except (OSError, subprocess.CalledProcessError):
        return "this is no git checkout, so no commit holds the code that is measured."
    paths = [line[3:].rpartition(" -> ")[2].strip('"') for line in status.splitlines()]
    changes = [path for path in paths if not path.startswith(GENERATED)]
    if not changes:
        return None
    return f"no commit holds the code that is measured; changed: {', '.join(changes[:5])}{' …' * (len(changes) > 5)}"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT, check=True).stdout


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
