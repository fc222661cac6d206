"""The work that all systems do, and the protocol that they do it by. Needs the standard library only.

A system is a process in a Python of its own. When it is ready it writes one JSON line, {package: version}; then for
each line {"rows", "adapters", "tokens"} that it reads, it continues that many of the folder's prompts by that many
tokens, greedily and past any end, row i through adapter i modulo `adapters` (0: the base alone), and writes
{"seconds", "tokens"}. It keeps nothing between requests but what it has loaded.
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
    """What all systems load."""

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


class Server:
    """Answers requests on stdin. Nothing else writes to stdout: libraries that print go to stderr."""

    def __init__(self) -> None:
        self.folder = Folder(Path(sys.argv[-1]))
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def run(self, generate: Generate, versions: Mapping[str, str]) -> None:
        """Answer until stdin ends."""
        self._write(versions)
        prompts = self.folder.prompts
        for line in sys.stdin:
            request = json.loads(line)
            rows, count = request["rows"], request["adapters"]
            adapters = [i % count if count else None for i in range(rows)]
            begin = time.perf_counter()
            tokens = generate(prompts[:rows], adapters, request["tokens"])
            self._write({"seconds": time.perf_counter() - begin, "tokens": tokens})

    def _write(self, value: Mapping[str, object]) -> None:
        print(json.dumps(value), file=self._out, flush=True)
