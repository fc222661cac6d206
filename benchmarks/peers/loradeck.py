"""This library's engine; the argument before the folder says how the base's weights are kept."""

import sys
import tempfile
from collections.abc import Sequence

from benchmarks.peers.workload import ROWS, Questions
from loradeck import AdapterStore, Base
from loradeck.base.onednn import cap_kernel_cache
from loradeck.base.weights import CHOICES
from loradeck.sampling import SamplingParams
from loradeck.serve.config import EngineConfig
from loradeck.serve.engine import Engine


def main() -> None:
    questions = Questions()
    weights = next(each for each in CHOICES if each == sys.argv[1])
    cap_kernel_cache()  # as `loradeck serve` does
    base = Base.load(questions.folder.base, dtype="bfloat16", weights=weights)
    with tempfile.TemporaryDirectory() as path:
        store = AdapterStore(path)
        names = [folder.name for folder in questions.folder.adapters]
        for folder in questions.folder.adapters:
            store.publish(folder.name, folder)
        with Engine(base, store, EngineConfig(max_rows=ROWS)) as engine:

            def generate(prompts: Sequence[list[int]], adapters: Sequence[int | None], tokens: int) -> list[list[int]]:
                through = [None if adapter is None else names[adapter] for adapter in adapters]
                answers = engine.generate(prompts, through, SamplingParams(max_tokens=tokens, ignore_eos=True))
                return [[token.id for token in answer] for answer in answers]

            questions.answer(generate, {})


if __name__ == "__main__":
    main()
