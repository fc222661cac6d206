"""What a result file says beside its figures: machine, versions, commit. And how figures are taken in turns."""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("loradeck", "torch", "transformers", "peft")


def in_turns(
    ways: Mapping[str, Callable[[], object]], rounds: int, settle: Callable[[], object] = lambda: None
) -> dict[str, float]:
    """Return each way's median seconds; the ways take turns, so that a noisy machine is noisy for all.

    `settle` waits for what a way leaves running, on a GPU.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()
    for _ in range(rounds):
        for name, way in ways.items():
            settle()
            start = time.perf_counter()
            way()
            settle()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(own) for name, own in times.items()}


def in_quiet_turns(ways: Mapping[str, Callable[[], object]], rounds: int, patience: float = 15) -> dict[str, float]:
    """As in_turns, but a round in which other processes took part of the machine is thrown away and done again.

    It ends after `patience` seconds; where fewer than three rounds were quiet by then, all count. Only Linux tells.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    noisy: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()
    end = time.monotonic() + patience
    while len(next(iter(times.values()))) < rounds and time.monotonic() < end:
        others, begun = _others(), time.perf_counter()
        own: dict[str, float] = {}
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            own[name] = time.perf_counter() - start
        quiet = _others() - others <= 0.1 * (time.perf_counter() - begun) + 0.02
        for name, seconds in own.items():
            (times if quiet else noisy)[name].append(seconds)
    enough = len(next(iter(times.values()))) >= 3
    return {name: statistics.median(kept if enough else [*kept, *noisy[name]]) for name, kept in times.items()}


def _others() -> float:
    """Return the seconds that cores have spent on other processes than this one, since the machine began."""
    try:
        user, nice, system, _, _, interrupts, soft, stolen = map(int, Path("/proc/stat").read_text().split()[1:9])
    except OSError:
        return 0.0
    return (user + nice + system + interrupts + soft + stolen) / os.sysconf("SC_CLK_TCK") - time.process_time()


def write(
    name: str, figures: dict[str, Any], versions: Mapping[str, str] | None = None, *, card: str | None = None
) -> Path:
    """Write benchmarks/results/NAME.json; `versions` are those of other systems, `card` the GPU that was measured."""
    packages = [package for package in PACKAGES if find_spec(package)]
    record = {
        "benchmark": name,
        "commit": _git("rev-parse", "--short", "HEAD") + ("+changes" if _git("status", "--porcelain", "src") else ""),
        "machine": f"{f'{card}; ' if card else ''}{_processor()}, {os.cpu_count()} cores, {platform.system()}",
        "versions": {
            **{package: version(package) for package in packages},
            **(versions or {}),
        },
        "figures": figures,
    }
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    return done.stdout.strip() or ("" if arguments[0] == "status" else "unknown")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
