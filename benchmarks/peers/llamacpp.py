"""llama.cpp's server, in this process (package xllamacpp), on the base as its users have it: Q4_1.

It computes rows of one adapter together, and those of different adapters one after the other.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import xllamacpp  # pyrefly: ignore [missing-import]  (it has a Python of its own)

from benchmarks.peers.workload import PROMPT, ROWS, Questions

NEW = 64  # room for new tokens in a row


def main() -> None:
    questions = Questions()
    params = xllamacpp.CommonParams()
    params.model.path = str(questions.folder.gguf)
    params.lora_adapters = [
        xllamacpp.CommonAdapterLoraInfo(str(folder.with_suffix(".gguf")), 0.0) for folder in questions.folder.adapters
    ]
    params.lora_init_without_apply = True
    params.n_parallel, params.n_ctx = ROWS, ROWS * (PROMPT + NEW)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = os.cpu_count() or 1
    params.verbosity = -1
    server = xllamacpp.Server(params)

    def continued(prompt: list[int], adapter: int | None, tokens: int) -> list[int]:
        request: dict[str, object] = {
            "prompt": prompt,
            "max_tokens": tokens,
            "lora": [{"id": adapter, "scale": 1.0}] * (adapter is not None),
            "samplers": ["top_k"],
            "top_k": 1,
            "ignore_eos": True,
            "cache_prompt": False,
            "return_tokens": True,
            "verbose": True,  # which is how its completions return tokens
        }
        return server.handle_completions(request)["__verbose"]["tokens"]

    with ThreadPoolExecutor(ROWS) as clients:

        def generate(prompts: Sequence[list[int]], adapters: Sequence[int | None], tokens: int) -> list[list[int]]:
            return list(clients.map(continued, prompts, adapters, [tokens] * len(prompts)))

        questions.answer(generate, {"xllamacpp": f"{xllamacpp.__version__} ({instructions()})"})


def instructions() -> str:
    """Return the widest instructions that this build of llama.cpp uses: one for this very machine may be faster."""
    built = xllamacpp.get_system_info()
    return next((name for name in ("AVX512", "AVX2", "AVX", "SVE", "NEON") if f"{name} = 1" in built), "plain")


if __name__ == "__main__":
    main()
