"""An engine's steps, timed."""

import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

from loradeck.runner.native_runner import NativeRunner
from loradeck.serve.engine import Engine


@dataclass(slots=True)
class Step:
    """One step of an engine."""

    rows: int
    tokens: int
    begin: float
    end: float
    """Both of the model's part, as `time.perf_counter` counts."""
    call: float
    """Seconds of it in the compiled step's call into C."""


@contextmanager
def timed(engine: Engine) -> Generator[list[Step]]:
    """Time an engine's steps."""
    steps: list[Step] = []
    runner: Any = engine._runner
    library: Any = runner.native.library if isinstance(runner, NativeRunner) else SimpleNamespace(loradeck_step=None)
    run, call = runner.run, library.loradeck_step
    in_c = 0.0

    def timed_run(batch: Any, cache: Any) -> Any:
        nonlocal in_c
        in_c, begin = 0.0, time.perf_counter()
        logits = run(batch, cache)
        tokens = sum(work.count for work in batch)
        steps.append(Step(len(batch), tokens, begin, time.perf_counter(), in_c))
        return logits

    def timed_call(*arguments: Any) -> int:
        nonlocal in_c
        begin = time.perf_counter()
        result = call(*arguments)
        in_c += time.perf_counter() - begin
        return result

    runner.run, library.loradeck_step = timed_run, timed_call
    try:
        yield steps
    finally:
        runner.run, library.loradeck_step = run, call


def decode_steps(steps: Sequence[Step], rows: int) -> list[tuple[Step, float]]:
    """Return the steps that compute one token of each row, with the seconds from their begin to the next step's."""
    return [(step, after.begin - step.begin) for step, after in pairwise(steps) if step.rows == step.tokens == rows]
