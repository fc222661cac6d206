"""A system at work: its process, its rates and its answers."""

import json
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import IO, Any, NamedTuple, Self

import psutil

from benchmarks.peers.workload import ROWS, Folder
from benchmarks.systems import Case

SECONDS, STEPS = 1.5, range(4, 33)  # of a rate: about so long, but at least and at most so many steps
QUIET = 0.05  # the share of the machine's cores that others may use


class Answer(NamedTuple):
    seconds: float
    """Of its steps, without the prompts."""
    prompt_seconds: float
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
    steps: dict[Case, int] = field(default_factory=dict)
    """Of a rate."""
    rates: dict[Case, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Tokens per second, decoding alone."""
    tokens: dict[Case, list[list[int]]] = field(default_factory=dict)
    _new: Iterator[int] = field(default_factory=partial(count, 1))
    """Counts new prompts, from the last on: the first ones are those of the other cases."""
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

    def generate(self, case: Case, steps: int, first: int = 0) -> Answer:
        """Continue the prompts from a number on by a token, and then by so many steps."""
        begin, busy, used = time.perf_counter(), _busy(), self._used()
        answer = self._ask({**case._asdict(), "steps": steps, "first": first})
        cores = (time.perf_counter() - begin) * (psutil.cpu_count() or 1)
        others = (_busy() - busy - (self._used() - used)) / cores
        return Answer(answer["seconds"], answer["prompt_seconds"], answer["tokens"], others)

    def score(self, number: int, length: int) -> list[float]:
        """Return the log-probabilities of a prompt's tokens, from the second on."""
        return self._ask({"score": number, "prompt": length})["logprobs"]

    def warm_up(self, case: Case) -> None:
        """Load, pack and compile what a case needs, and choose its number of steps."""
        least, most = STEPS[0], STEPS[-1]
        step = self.generate(case, least).seconds / least
        self.steps[case] = min(max(round(SECONDS / step), least), most)

    def measure(self, case: Case, tries: int) -> float:
        """Add a rate and return it: the first of these tries on a quiet machine, or the quietest."""
        answer = self._quiet(lambda: self.generate(case, self.steps[case]), tries)
        self.tokens[case] = answer.tokens
        self.rates[case].append(case.rows * self.steps[case] / answer.seconds)
        return self.rates[case][-1]

    def measure_prompts(self, case: Case, tries: int) -> float:
        """Add the rate of new prompts until their first tokens, and return it; chosen as in `measure`."""
        answer = self._quiet(lambda: self.generate(case, 0, -next(self._new) * case.rows % ROWS), tries)
        self.rates[case].append(case.rows * case.prompt / answer.prompt_seconds)
        return self.rates[case][-1]

    def _quiet(self, generate: Callable[[], Answer], tries: int) -> Answer:
        answers: list[Answer] = []
        while len(answers) < tries and (not answers or answers[-1].others > QUIET):
            answers.append(generate())
        answer = min(answers, key=lambda answer: answer.others)
        self.others = max(self.others, answer.others)
        return answer

    def rate(self, case: Case) -> float:
        """Return the median tokens per second."""
        return statistics.median(self.rates[case])

    def figures(self, mixed: Case, reference: "System") -> dict[str, float]:
        """Return the rates, and how the answers to a case compare with another system's and with the base's."""
        base = zip(self.tokens[mixed], self.tokens[Case(mixed.rows)], strict=True)
        pairs = zip(self.tokens[mixed], reference.tokens[mixed], strict=True)
        return {
            **{f"{case} (tokens/s)": self.rate(case) for case in self.rates},
            f"first tokens equal to {reference.name}'s, of {mixed.rows}": sum(a[0] == b[0] for a, b in pairs),
            f"answers that the adapters change, of {mixed.rows}": sum(a[: len(b)] != b[: len(a)] for a, b in base),
            "others' share of the machine, at most": self.others,
        }

    def _ask(self, request: Mapping[str, int]) -> Any:
        assert self.process.stdin
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return self._read()

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


def _busy() -> float:
    """Return the seconds for which cores have been busy."""
    times: Any = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)
