"""Systems that decode and read prompts on one base, each for a process of its own: see `processes.worker`."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from benchmarks.harness import seconds
from benchmarks.memory import peak
from benchmarks.steps import decode_steps, timed
from benchmarks.workloads import docstring_examples, greedy, training_steps
from loradeck import AdapterStore, Base
from loradeck.base.onednn import cap_kernel_cache
from loradeck.base.openmp import share_cores
from loradeck.base.text import encode
from loradeck.runner.native_runner import NativeRunner
from loradeck.sampling import SamplingParams
from loradeck.serve.config import EngineConfig
from loradeck.serve.engine import Engine

STEPS = 32  # tokens that a row decodes after its first
ANSWER = 128  # tokens at most, of a chat
ROWS = 64  # of an engine


class Case(NamedTuple):
    """Rows of a batch, how many different adapters they go through (0: the base alone), and tokens of each prompt."""

    rows: int
    adapters: int = 0
    prompt: int = 64

    def __str__(self) -> str:
        rows = f"{self.rows} row{'s' * (self.rows > 1)}"
        through = f"{self.adapters} adapter{'s' * (self.adapters > 1)}" if self.adapters else "base"
        return f"{rows}, {through}" + (f", {self.prompt:,} tokens of context" if self.prompt != 64 else "")


class System:
    """Computes cases: call it with the name of a method and a case."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self._rng = torch.Generator().manual_seed(0)

    def __call__(self, method: str, case: Case) -> Any:
        return getattr(self, method)(case)

    def prompts(self, case: Case) -> list[list[int]]:
        """Return new prompts."""
        size = case.rows, case.prompt
        return torch.randint(3, self.base.model.config.vocab_size, size, generator=self._rng).tolist()


class EngineSystem(System):
    """An engine; with `eager` it computes by transformers' modules."""

    def __init__(self, source: str | Path, dtype: str, folder: Path, eager: bool) -> None:
        share_cores()  # this and the next as `loradeck serve` does
        cap_kernel_cache()
        super().__init__(Base.load(source, dtype=dtype, weights="packed" if eager else "blocks"))
        config = EngineConfig(
            max_rows=ROWS,
            kv_cache_bytes=4 << 30,  # room for all prompts
            num_speculative_tokens=0,  # a step computes one token of every row
            enforce_eager=eager,
        )
        self.engine = Engine(self.base, AdapterStore(folder), config)
        if not eager and not isinstance(self.engine._runner, NativeRunner):
            raise RuntimeError("the step is not compiled here; `loradeck doctor` says why")
        self._kept: dict[Case, list[list[int]]] = {}

    def decode(self, case: Case) -> tuple[float, float]:
        """Return the mean seconds of a step that decodes all rows, and of them those of the call into C."""
        if case not in self._kept:
            self._kept[case] = self.prompts(case)
            self._generate(case, self._kept[case], 1)  # from now on they are in the prefix cache
        with timed(self.engine) as steps:
            self._generate(case, self._kept[case], 1 + STEPS)
        whole = decode_steps(steps, case.rows)
        return statistics.mean(period for _, period in whole), statistics.mean(step.call for step, _ in whole)

    def first_token(self, case: Case) -> float:
        """Return the seconds to the first token of all rows."""
        prompts = self.prompts(case)
        return seconds(lambda: self._generate(case, prompts, 1))

    def _generate(self, case: Case, prompts: list[list[int]], tokens: int) -> None:
        names = [f"a{row % case.adapters}" if case.adapters else None for row in range(case.rows)]
        self.engine.generate(prompts, names, SamplingParams(max_tokens=tokens, ignore_eos=True))


class Speculation:
    """An engine, with speculative decoding or without: call it with a request of a chat."""

    def __init__(self, source: str | Path, dtype: str, drafts: bool) -> None:
        share_cores()
        cap_kernel_cache()
        self._base = Base.load(source, dtype=dtype, weights="blocks")
        config = EngineConfig() if drafts else EngineConfig(num_speculative_tokens=0)
        self._engine = Engine(self._base, None, config)

    def __call__(self, request: str, rows: int, temperature: float) -> tuple[float, float]:
        """Return the tokens per second of all rows, and the share of the drafts that was accepted."""
        prompt = encode(self._base.tokenizer, [{"role": "user", "content": request}])
        stats, params = (
            self._engine.stats,
            [SamplingParams(max_tokens=ANSWER, temperature=temperature, seed=row) for row in range(rows)],
        )
        self._engine.generate([prompt] * rows, None, SamplingParams(max_tokens=1))  # from now on it is a known prefix
        drafts, accepted = stats.draft_tokens, stats.accepted_tokens
        begin = time.perf_counter()
        tokens = sum(map(len, self._engine.generate([prompt] * rows, None, params)))
        rate = tokens / (time.perf_counter() - begin)
        return rate, (stats.accepted_tokens - accepted) / max(1, stats.draft_tokens - drafts)


class Transformers(System):
    """Plain transformers."""

    def __init__(self, source: str | Path, dtype: str) -> None:
        super().__init__(Base.load(source, dtype=dtype))

    def decode(self, case: Case) -> tuple[float, float]:
        """Return the mean seconds of a step; none is compiled."""
        times: list[float] = []  # when the prompts began, and when each token was there

        def put(_: object) -> None:
            times.append(time.perf_counter())

        streamer = SimpleNamespace(put=put, end=lambda: None)
        greedy(self.base.model, self.prompts(case), 1 + STEPS, streamer=streamer)
        return (times[-1] - times[1]) / STEPS, 0.0

    def answer(self, case: Case) -> float:
        """Return the seconds of the prompts and 1 + STEPS new tokens of all rows."""
        prompts = self.prompts(case)
        return seconds(lambda: greedy(self.base.model, prompts, 1 + STEPS))

    @torch.inference_mode()
    def first_token(self, case: Case) -> float:
        """Return the seconds to the last logits of all rows."""
        ids = torch.tensor(self.prompts(case))
        return seconds(lambda: self.base.model(input_ids=ids, use_cache=True, logits_to_keep=1))


class TrainingSteps:
    """Trains on a file: each call makes a step, and returns its seconds and the MiB that it took at its peak."""

    def __init__(self, file: Path, dtype: str, adapter: Path, sequences: int, count: int) -> None:
        share_cores()
        base = Base.load(file, dtype=dtype, weights="packed")  # as `loradeck train` does
        self._steps = training_steps(base, adapter, [docstring_examples(base)], sequences, count)
        with torch.no_grad():
            base.model(torch.zeros(1, 1, dtype=torch.int64))  # reads weights that are mapped and not yet in memory

    def __call__(self) -> tuple[float, float]:
        times: list[float] = []
        mebibytes = peak(lambda: times.append(seconds(lambda: next(self._steps))))
        return times[0], mebibytes


class PlainRead:
    """Reads as many bytes by torch's reductions; a call returns the seconds of the fastest."""

    def __init__(self, nbytes: int) -> None:
        floats, columns = torch.ones(nbytes // 1024, 256), torch.ones(256)
        numbers = floats.flatten()
        self._reductions: tuple[Callable[[], object], ...] = (
            numbers.sum,
            numbers.view(torch.int64).sum,
            numbers.view(torch.int32).amax,
            partial(numbers.dot, numbers),
            partial(floats.mv, columns),
        )

    def __call__(self) -> float:
        return min(map(seconds, self._reductions))
