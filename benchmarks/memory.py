"""Resident memory of a process: now, at its peak, and over time."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

MOMENTS = {"after warm-up": 0.25, "half way": 0.5, "three quarters": 0.75, "at the end": 1.0}
MIB = 2**20


def resident(pid: int | None = None) -> int:
    """Return the bytes that a process holds, this one by default."""
    return psutil.Process(pid).memory_info().rss


def peak(run: Callable[[], object]) -> float:
    """Call `run` and return the MiB that it took at its peak, by the kernel's own figures (Linux)."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is held now
    before = _high_water()
    run()
    return (_high_water() - before) / MIB


def _high_water() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


@dataclass
class MemoryTrace:
    """The memory of a process over time, this one by default."""

    pid: int | None = None
    samples: list[tuple[float, int]] = field(default_factory=list)
    """(seconds, bytes)"""

    def watch(self, seconds: float, check: Callable[[], bool] = lambda: False, *, every: float = 1.0) -> None:
        """Take a sample every so often; stop early when `check`, which is called each time, says so."""
        start = time.monotonic()
        finished = False
        while not finished:
            self.samples.append((time.monotonic() - start, resident(self.pid)))
            finished = check() or time.monotonic() - start >= seconds
            time.sleep(min(every, seconds / 40))

    def figures(self) -> dict[str, float]:
        """Return the mean around each moment; single samples vary with what a step holds."""
        end = self.samples[-1][0]
        means: dict[str, float] = {}
        for name, moment in MOMENTS.items():
            around = [nbytes for at, nbytes in self.samples if abs(at - moment * end) <= 0.05 * end]
            nearest = min(self.samples, key=lambda sample, moment=moment: abs(sample[0] - moment * end))
            means[name] = statistics.mean(around or [nearest[1]])
        figures = {f"memory {name} (MB)": mean / 1e6 for name, mean in means.items()}
        return {**figures, "memory at the end / after warm-up": means["at the end"] / means["after warm-up"]}
