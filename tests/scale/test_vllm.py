"""vLLM serves the adapters of a store through the plugin: a real server, the real SmolLM2-135M in float32.

LORADECK_VLLM names a Python that has vLLM and what loradeck needs; see docs/scale.md.
"""

import json
import os
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from loradeck import Adapter, AdapterStore, Bank, Base, LoraConfig
from loradeck.sampling import SamplingParams
from loradeck.serve.config import EngineConfig
from loradeck.serve.engine import Engine

ROOT = Path(__file__).parent.parent.parent
PYTHON = os.environ.get("LORADECK_VLLM") or (sys.executable if find_spec("vllm") else "")
COUNT, TOKENS = 16, 24
PROMPTS = ["The sea is", "Once upon a time", "def add(a, b):", "My favourite food"]
# What vLLM reads in each way: plain ones, rank-stabilised ones, and those whose modules differ.
CONFIGS = [
    LoraConfig(r=4, lora_alpha=8),
    LoraConfig(r=8, lora_alpha=8, use_rslora=True),
    LoraConfig(r=4, lora_alpha=8, rank_pattern={"q_proj": 6, "down_proj": 2}, alpha_pattern={"up_proj": 3}),
    LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
]
pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="needs vLLM, here or in the environment of LORADECK_VLLM=…/bin/python"),
]


def adapter(base: Base, seed: int) -> Adapter:
    """Return an adapter that changes what SmolLM2 says."""
    bank = Bank(base.model)
    new = bank.add("new", CONFIGS[seed % len(CONFIGS)])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    bank.detach()
    return new


@dataclass
class Server:
    """A running vLLM, the store that it serves, and the file of its log."""

    address: str
    store: AdapterStore
    log: Path

    def post(self, path: str, **body: Any) -> tuple[int, Any]:
        request = urllib.request.Request(
            self.address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=600) as response:
                status, text = response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read().decode()
        return status, json.loads(text) if text.startswith("{") else text

    def tokens(self, model: str, prompt: list[int]) -> list[int]:
        body = {"max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        status, answer = self.post("/v1/completions", model=model, prompt=prompt, **body)
        assert status == 200, answer
        return answer["choices"][0]["token_ids"]

    def refusal(self, model: str) -> tuple[int, str]:
        status, answer = self.post("/v1/completions", model=model, prompt="The sea", max_tokens=1)
        return status, answer["error"]["message"]


@pytest.fixture(scope="module")
def server(smollm2: Base, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("vllm")
    smollm2.model.save_pretrained(folder / "base")
    smollm2.tokenizer.save_pretrained(folder / "base")
    store = AdapterStore(folder / "adapters")
    for number in range(COUNT):
        store.publish(f"a{number}", adapter(smollm2, number))
    store.publish("a0", adapter(smollm2, COUNT))
    torn = adapter(smollm2, 0).save(store.folder / "torn") / "adapter_model.safetensors"
    torn.write_bytes(torn.read_bytes()[:-100])
    path = "model.layers.0.self_attn.q_proj"
    Adapter.of(LoraConfig(r=4), {path: (torch.ones(4, 64), torch.ones(64, 4))}).save(store.folder / "narrow")
    # vLLM finds the plugin as pip would install it.
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["vllm.general_plugins"]
    metadata = folder / "path" / "loradeck-0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: loradeck\nVersion: 0\n")
    lines = [f"{name} = {value}" for name, value in points.items()]
    (metadata / "entry_points.txt").write_text("\n".join(["[vllm.general_plugins]", *lines]))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    settings = {
        "PYTHONPATH": os.pathsep.join([str(metadata.parent), str(ROOT / "src")]),
        "LORADECK_ADAPTERS": str(store.folder),
        "LORADECK_CACHE": str(folder / "cache"),
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    flags = {
        "model": folder / "base", "served-model-name": "base", "dtype": "float32", "max-loras": 4, "max-cpu-loras": 32,
        "max-lora-rank": 8, "max-num-seqs": 8, "max-model-len": 512, "host": "127.0.0.1", "port": port,
    }  # fmt: skip
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--enable-lora", "--enforce-eager"]
    command += [str(part) for flag, value in flags.items() for part in (f"--{flag}", value)]
    log = folder / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, env={**os.environ, **settings}, cwd=folder, stdout=file, stderr=subprocess.STDOUT
        )
    try:
        wait(process, f"http://127.0.0.1:{port}/health", log)
        yield Server(f"http://127.0.0.1:{port}", store, log)
    finally:
        process.terminate()
        process.wait(120)


def wait(process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    """Wait until the server answers, ten minutes at most; fail with its log if it ends."""
    end = time.monotonic() + 600
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=10).close()
        except OSError:
            time.sleep(0.5)
        else:
            return
    pytest.fail(f"vLLM does not answer:\n{log.read_text(errors='replace')[-4000:]}")


def ours(base: Base, store: AdapterStore, names: list[str | None], prompts: list[list[int]]) -> list[list[int]]:
    sampling = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
    with Engine(base, store, EngineConfig()) as engine:
        return [[token.id for token in answer] for answer in engine.generate(prompts, names, sampling)]


def test_vllm_answers_as_we_do_by_name_and_by_version(server: Server, smollm2: Base) -> None:
    names = [f"a{number}" for number in range(COUNT)]
    names = [*names, *(f"{name}@1" for name in names), "a0@2", "a0@latest"]
    encoded = [smollm2.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    prompts = [encoded[at % len(encoded)] for at in range(len(names))]
    with ThreadPoolExecutor(8) as pool:
        theirs = [*pool.map(server.tokens, names, prompts)]
    assert theirs == ours(smollm2, server.store, [*names], prompts)
    assert len({*map(tuple, theirs)}) > COUNT // 2  # the adapters differ in what they say
    first, latest = names.index("a0@1"), names.index("a0@2")
    assert server.tokens("a0@1", prompts[0]) != server.tokens("a0", prompts[0])
    assert server.tokens("a0@2", prompts[latest]) == theirs[latest]
    assert server.tokens("a0@1", prompts[first]) == theirs[first]


def test_the_base_stays_the_base(server: Server, smollm2: Base) -> None:
    prompt = smollm2.tokenizer(PROMPTS[0])["input_ids"]
    assert [server.tokens("base", prompt)] == ours(smollm2, server.store, [None], [prompt])


@pytest.mark.parametrize("name", ["a99", "a1@7", "../a1", "a1@01"])
def test_an_unknown_name_is_a_404(server: Server, name: str) -> None:
    status, message = server.refusal(name)
    assert (status, f"`{name}` does not exist" in message) == (404, True), message


def test_a_broken_adapter_is_refused_with_the_reason(server: Server) -> None:
    reason = "is damaged: its tensors end at byte"
    status, message = server.refusal("torn")
    assert (status, reason in message) == (400, True), message
    log = server.log.read_text(errors="replace")
    assert f"The adapter torn is refused: {server.store.folder / 'torn' / 'adapter_model.safetensors'} {reason}" in log


def test_an_adapter_of_another_base_is_refused(server: Server) -> None:
    status, message = server.refusal("narrow")
    assert (status, "q_proj needs A (4, 576) and B (576, 4) here" in message) == (400, True), message


def test_a_published_version_is_served_at_once_and_a_loaded_name_after_it_is_unloaded(
    server: Server, smollm2: Base
) -> None:
    prompt = smollm2.tokenizer(PROMPTS[1])["input_ids"]
    server.store.publish("fresh", adapter(smollm2, 40))
    first = server.tokens("fresh", prompt)
    server.store.publish("fresh", adapter(smollm2, 44))
    second = server.tokens("fresh@2", prompt)
    assert [first, second] == ours(smollm2, server.store, ["fresh@1", "fresh@2"], [prompt] * 2)
    assert first != second
    assert server.tokens("fresh", prompt) == first  # vLLM asks for a name once
    assert server.post("/v1/unload_lora_adapter", lora_name="fresh")[0] == 200
    assert server.tokens("fresh", prompt) == second


SCRIPT = """
import asyncio, os, sys
from vllm.lora.resolver import LoRAResolverRegistry
from loradeck.errors import ConfigError
from loradeck.vllm_plugin import register

store, base = sys.argv[1:]
register()
print(len(LoRAResolverRegistry.resolvers))
os.environ["LORADECK_ADAPTERS"] = store + "/nowhere"
try:
    register()
except ConfigError as error:
    print(str(error).replace(chr(10), " "))
os.environ["LORADECK_ADAPTERS"] = store
register()
resolver = LoRAResolverRegistry.get_resolver("loradeck")
for name in ("whole", "high", "dora"):
    try:
        print(asyncio.run(resolver.resolve_lora(base, name)))
    except ValueError as error:
        print(str(error).replace(chr(10), " "))
"""


def test_what_vllm_cannot_compute_is_refused(tmp_path: Path, tiny: LlamaForCausalLM, tiny_folder: Path) -> None:
    store, path = tmp_path / "adapters", "model.layers.0.self_attn.q_proj"
    pair = torch.ones(2, 64), torch.ones(64, 2)
    plain = Adapter.of(LoraConfig(r=2), {path: pair})
    head = {"lm_head": {"weight": tiny.lm_head.weight}}
    config = replace(plain.config, modules_to_save=("lm_head",))
    Adapter.with_sites(config, plain.sites, {path: pair}, saved=head).save(store / "whole")
    Adapter.of(LoraConfig(r=513), {path: (torch.ones(513, 64), torch.ones(64, 513))}).save(store / "high")
    table = json.loads((plain.save(store / "dora") / "adapter_config.json").read_text())
    (store / "dora" / "adapter_config.json").write_text(json.dumps({**table, "use_dora": True}))
    command = [PYTHON, "-c", SCRIPT, str(store), str(tiny_folder)]
    settings = {"PYTHONPATH": str(ROOT / "src"), "LORADECK_CACHE": str(tmp_path / "cache")}
    env = {name: value for name, value in os.environ.items() if name != "LORADECK_ADAPTERS"}
    done = subprocess.run(command, env={**env, **settings}, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    nothing, nowhere, whole, high, dora = [line for line in done.stdout.splitlines() if "vllm_plugin.py" not in line]
    assert (nothing, nowhere.endswith("nowhere, which is not a folder Name a folder of adapters.")) == ("0", True)
    assert "whole has whole weights, which vLLM does not read: lm_head Merge it into its base" in whole
    assert "vLLM takes ranks up to 512," in high
    assert "high has 513 Lower the rank with `loradeck convert`." in high
    assert "use_dora=True is DoRA" in dora
    assert not (tmp_path / "cache" / "vllm").exists()
