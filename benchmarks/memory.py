"""Resident memory of a process over time: is it flat? Knows a process's id."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil

MOMENTS = {"after warm-up": 0.25, "half way": 0.5, "three quarters": 0.75, "at the end": 1.0}


@dataclass
class Memory:
    """The memory of a process, this one by default."""

    pid: int | None = None
    seen: list[tuple[float, int]] = field(default_factory=list)
    """(share of the time, bytes)"""

    def watch(self, seconds: float, also: Callable[[], object] = lambda: None, *, every: float = 1.0) -> None:
        """Look every so many seconds, and do something `also` then."""
        begun = time.monotonic()
        while (passed := time.monotonic() - begun) < seconds:
            self.look(passed / seconds)
            also()
            time.sleep(min(every, seconds / 40))
        self.look(1.0)

    def look(self, share: float) -> None:
        self.seen.append((share, psutil.Process(self.pid).memory_info().rss))

    def figures(self) -> dict[str, float]:
        """Return the mean around each moment; single looks jump by what a step has in its hands."""
        around = {name: [own for share, own in self.seen if abs(share - at) <= 0.05] for name, at in MOMENTS.items()}
        means = {name: sum(own) / len(own) for name, own in around.items()}
        first = means["after warm-up"]
        figures = {f"memory {name} (MB)": own / 1e6 for name, own in means.items()}
        return {**figures, "memory at the end / after warm-up": means["at the end"] / first}
