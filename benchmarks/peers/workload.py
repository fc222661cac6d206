"""The work that all systems do, and the protocol that they do it by. Needs the standard library only.

A system is a process in a Python of its own. When it is ready it writes one JSON line, {package: version}. Then it
answers each line that it reads:

- {"rows", "adapters", "prompt", "steps", "first"}: it continues so many prompts of that length, from number `first` on,
  greedily and past any end, row i through adapter i modulo `adapters` (0: the base alone), and writes {"seconds",
  "prompt_seconds", "tokens"}: the 1 + `steps` new tokens of each row, the seconds of those steps, and those before. It
  may keep what it computed of a prompt.
- {"score", "prompt"}: it writes {"logprobs"} of the tokens of the prompt of that number and length, on the base, from
  the second token on.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

ROWS = 64  # of the largest batch; so many adapters and prompts there are
FEW = 16  # adapters, for systems that are not asked for more
LONGEST = 1000  # tokens of a prompt
NEW = 64  # room for new tokens in a row


class Answer(NamedTuple):
    tokens: list[list[int]]
    """The new tokens of each row."""
    seconds: float
    """From the moment at which all rows have a first token to the one at which all have all."""


Generate = Callable[[Sequence[list[int]], Sequence[int | None], int], Answer]
"""(prompts, the number of each row's adapter, steps after the first token) -> answer."""
Score = Callable[[list[int]], list[float]]
"""A prompt -> the log-probabilities of its tokens on the base, from the second on."""


@dataclass(frozen=True)
class Folder:
    """What all systems load."""

    path: Path

    @property
    def base(self) -> Path:
        """A transformers model in `dtype`, with its tokenizer."""
        return self.path / "base"

    @cached_property
    def dtype(self) -> str:
        """What systems compute in: "float32" or "bfloat16"."""
        return json.loads((self.base / "config.json").read_text(encoding="utf-8"))["dtype"]

    @property
    def gguf(self) -> Path:
        """The same base for llama.cpp."""
        return self.path / "base.gguf"

    @property
    def coarse_gguf(self) -> Path:
        """The same base as llama.cpp's users have it, in few bits."""
        return self.path / "base.coarse.gguf"

    @property
    def adapters(self) -> list[Path]:
        """PEFT folders, a00, a01, …; beside each its export, NAME.gguf."""
        return sorted(self.path.glob("a[0-9][0-9]"))

    def prompts(self, count: int, length: int, first: int = 0) -> list[list[int]]:
        """Return prompts that begin differently, from a number on."""
        return [each[:length] for each in self._prompts[first : first + count]]

    @cached_property
    def _prompts(self) -> list[list[int]]:
        return json.loads((self.path / "prompts.json").read_text(encoding="utf-8"))


class Server:
    """Answers requests on stdin. Nothing else writes to stdout: libraries that print go to stderr."""

    def __init__(self) -> None:
        self.folder = Folder(Path(sys.argv[-1]))
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def run(
        self, generate: Generate, versions: Mapping[str, str], *, mixes: bool = True, score: Score | None = None
    ) -> None:
        """Answer until stdin ends. A system that does not mix adapters gets those of a request one after the other."""
        self._write(versions)
        for line in sys.stdin:
            request = json.loads(line)
            if "score" in request:
                assert score
                self._write({"logprobs": score(*self.folder.prompts(1, request["prompt"], request["score"]))})
                continue
            rows, count = request["rows"], request["adapters"]
            prompts = self.folder.prompts(rows, request["prompt"], request["first"])
            adapters = [i % count if count else None for i in range(rows)]
            tokens: dict[int, list[int]] = {}
            seconds, begin = 0.0, time.perf_counter()
            for group in [range(rows)] if mixes or not count else [range(i, rows, count) for i in range(count)]:
                answer = generate([prompts[i] for i in group], [adapters[i] for i in group], request["steps"])
                tokens |= zip(group, answer.tokens, strict=True)
                seconds += answer.seconds
            prompt_seconds = time.perf_counter() - begin - seconds
            answers = [tokens[i] for i in range(rows)]
            self._write({"seconds": seconds, "prompt_seconds": prompt_seconds, "tokens": answers})

    def _write(self, value: Mapping[str, object]) -> None:
        print(json.dumps(value), file=self._out, flush=True)
