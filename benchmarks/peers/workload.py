"""What each system is asked, and how it answers. Knows no system; needs the standard library only.

A system is a process in a Python of its own, `PYTHON -m benchmarks.peers.NAME [WEIGHTS] FOLDER`. Once it is ready it
writes one JSON line, {package: version}; then for each line {"rows", "adapters", "tokens"} that it reads it continues
so many of the folder's prompts by so many tokens, greedily and past any end, row i through adapter i modulo `adapters`
(0: the base alone), and writes {"seconds", "tokens"}. It keeps nothing from one question to the next but
what it has loaded.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROWS, PROMPT = 16, 64
Generate = Callable[[Sequence[list[int]], Sequence[int | None], int], list[list[int]]]
"""(prompts, the number of each row's adapter, new tokens) -> the new tokens of each row."""


@dataclass(frozen=True)
class Folder:
    """What all systems load, made by __main__.py."""

    path: Path

    @property
    def base(self) -> Path:
        """A transformers model in bfloat16, with its tokenizer."""
        return self.path / "base"

    @property
    def gguf(self) -> Path:
        """The same base as llama.cpp's users have it."""
        return self.path / "base.gguf"

    @property
    def adapters(self) -> list[Path]:
        """PEFT folders in bfloat16; beside each its export, NAME.gguf."""
        return [self.path / f"a{i:02d}" for i in range(ROWS)]

    @property
    def prompts(self) -> list[list[int]]:
        return json.loads((self.path / "prompts.json").read_text(encoding="utf-8"))


class Questions:
    """The questions on stdin, and the only ones who may write to stdout: libraries that print go to stderr."""

    def __init__(self) -> None:
        self.folder = Folder(Path(sys.argv[-1]))
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def answer(self, generate: Generate, versions: Mapping[str, str]) -> None:
        """Answer until there are no more."""
        self._write(versions)
        prompts = self.folder.prompts
        for line in sys.stdin:
            asked = json.loads(line)
            rows, adapters = asked["rows"], asked["adapters"]
            through = [i % adapters if adapters else None for i in range(rows)]
            begun = time.perf_counter()
            tokens = generate(prompts[:rows], through, asked["tokens"])
            self._write({"seconds": time.perf_counter() - begun, "tokens": tokens})

    def _write(self, value: Mapping[str, object]) -> None:
        print(json.dumps(value), file=self._out, flush=True)
