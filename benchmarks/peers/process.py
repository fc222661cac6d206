"""A system at work: its process, its rates and its answers."""

import json
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple, Self

import psutil

from benchmarks.peers.workload import Folder

STEPS = 32
QUIET, PATIENCE = 0.05, 20  # the share of the machine's cores that others may use; seconds to wait for that


class Case(NamedTuple):
    """Rows of a batch, and how many different adapters they go through; 0 is the base alone."""

    rows: int
    adapters: int

    def __str__(self) -> str:
        adapters = {0: "base", 1: "1 adapter"}.get(self.adapters, f"{self.adapters} adapters")
        return f"{self.rows} row{'s' * (self.rows > 1)}, {adapters}"


class Answer(NamedTuple):
    seconds: float
    tokens: list[list[int]]
    others: float
    """The share of the machine's cores that other processes used meanwhile."""


@dataclass
class System:
    """A system that is ready, and what was measured."""

    name: str
    process: subprocess.Popen[str]
    log: IO[str]
    versions: dict[str, str] = field(default_factory=dict)
    rates: dict[Case, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Tokens per second, decoding alone."""
    tokens: dict[Case, list[list[int]]] = field(default_factory=dict)
    others: float = 0.0
    """The largest share that other processes used during a rate that counts."""

    @classmethod
    def start(cls, name: str, command: list[str], folder: Folder) -> Self | None:
        """Start a system; if it fails, print why and return None."""
        log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - `stop` closes it
        process = subprocess.Popen(
            [*command, str(folder.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
        system = cls(name, process, log)
        try:
            system.versions = system._read()
        except RuntimeError as error:
            print(f"left out: {error}")
            system.stop()
            return None
        return system

    def stop(self) -> None:
        """End the process."""
        with self.process, self.log:
            assert self.process.stdin
            self.process.stdin.close()

    def generate(self, case: Case, tokens: int) -> Answer:
        """Continue the prompts by that many tokens."""
        assert self.process.stdin
        begin, busy, used = time.perf_counter(), _busy(), self._used()
        print(json.dumps({**case._asdict(), "tokens": tokens}), file=self.process.stdin, flush=True)
        answer = self._read()
        cores = (time.perf_counter() - begin) * (psutil.cpu_count() or 1)
        return Answer(answer["seconds"], answer["tokens"], (_busy() - busy - (self._used() - used)) / cores)

    def measure(self, case: Case, tries: int) -> float:
        """Add a rate and return it: the first of these tries on a quiet machine, or the quietest."""
        results: list[tuple[float, float]] = []
        while len(results) < tries and (not results or results[-1][0] > QUIET):
            _wait()
            short, long = self.generate(case, 1), self.generate(case, 1 + STEPS)
            rate = case.rows * STEPS / (long.seconds - short.seconds)
            results.append((max(short.others, long.others), rate))
            self.tokens[case] = long.tokens
        others, rate = min(results)
        self.rates[case].append(rate)
        self.others = max(self.others, others)
        return rate

    def figures(self, reference: "System") -> dict[str, float]:
        """Return the rates, and how the answers compare with another system's."""
        most = max(self.rates)
        tokens, expected, base = self.tokens[most], reference.tokens[most], self.tokens[Case(most.rows, 0)]
        return {
            **{f"{case} (tokens/s)": round(statistics.median(rates), 2) for case, rates in self.rates.items()},
            f"first tokens equal to {reference.name}'s, of {most.rows}": sum(
                a[0] == b[0] for a, b in zip(tokens, expected, strict=True)
            ),
            f"answers that the adapters change, of {most.rows}": sum(a != b for a, b in zip(tokens, base, strict=True)),
            "others' share of the machine, at most": round(self.others, 3),
        }

    def _read(self) -> Any:
        assert self.process.stdout
        if line := self.process.stdout.readline():
            return json.loads(line)
        code = self.process.wait()
        self.log.seek(0)
        last = [line.strip() for line in self.log if line.strip()][-3:]
        raise RuntimeError(f"{self.name} ended with code {code}: {last}")

    def _used(self) -> float:
        process = psutil.Process(self.process.pid)
        return sum(sum(each.cpu_times()[:2]) for each in [process, *process.children(recursive=True)])


def _wait() -> None:
    """Wait until other processes leave the machine alone, but not for ever."""
    for _ in range(PATIENCE):
        busy = _busy()
        time.sleep(1)
        if _busy() - busy < QUIET * (psutil.cpu_count() or 1):
            return


def _busy() -> float:
    """Return the seconds for which cores have been busy."""
    times: Any = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)
