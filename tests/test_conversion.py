"""Adapters from one format to another. PEFT is the judge; mlx-lm and llama.cpp are asked in lora/test_mlx.py and
lora/test_llamacpp.py, vLLM's reader here, in a Python that has it: LORADECK_VLLM names it.
"""

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from loradeck import Adapter, Bank, Base, LoraConfig, convert
from loradeck.base.fingerprint import fingerprint
from loradeck.conversion import FORMATS
from loradeck.errors import AdapterError, ConfigError, LoradeckError, UnsupportedError
from loradeck.gguf.adapter import export, read
from loradeck.llamacpp import Architecture
from loradeck.lora.combine import lower_rank
from loradeck.lora.manifest import read_folder
from loradeck.lora.uniform import uniform

PYTHON = os.environ.get("LORADECK_VLLM") or (sys.executable if find_spec("vllm") else "")
IDS = torch.tensor([[5, 80, 130, 7, 259, 3], [9, 9, 31, 64, 2, 1]])
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
MIXED = LoraConfig(
    r=4,
    lora_alpha=12,
    use_rslora=True,
    rank_pattern={"q_proj": 6, "down_proj": 3},
    alpha_pattern={"o_proj": 40, "up_proj": 0},
)
PAIRS = {"q_proj": (64, 64), "k_proj": (32, 64), "o_proj": (64, 64), "up_proj": (96, 64), "down_proj": (64, 96)}
# PEFT says these of its own doings.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*changes the base weights of the model:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA with rank_pattern"),
]


def made(config: LoraConfig = MIXED, dtype: torch.dtype = torch.float32) -> Adapter:
    generator = torch.Generator().manual_seed(0)
    pairs = {}
    for name, (rows, columns) in PAIRS.items():
        path = f"model.layers.1.{'mlp' if name.startswith(('up', 'down')) else 'self_attn'}.{name}"
        a = torch.randn(config.rank(path), columns, generator=generator)
        pairs[path] = a.to(dtype), torch.randn(rows, len(a), generator=generator).to(dtype)
    return Adapter.of(config, pairs)


def update(adapter: Adapter, path: str) -> Tensor:
    a, b = (half.detach().double() for half in adapter.pair(path))
    return adapter.sites[path].scaling * b @ a


def outputs(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def routed(model: PreTrainedModel, folder: Path) -> Tensor:
    bank = Bank(model)
    with bank.route(bank.load(folder, "it")):
        y = outputs(model)
    bank.detach()
    return y


def trained(model: PreTrainedModel, folder: Path, config: PeftConfig) -> Tensor:
    """Let PEFT begin an adapter, save it in `initial`, change it as training does, save it; return its outputs."""
    adapted = get_peft_model(model, config).eval()
    init = config.init_lora_weights
    config.init_lora_weights = True  # as PEFT's documentation has it
    adapted.save_pretrained(folder.with_name("initial"))
    config.init_lora_weights = init
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "lora_" in key:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(folder)
    return outputs(adapted)


def gpt2() -> GPT2LMHeadModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=260, n_embd=64, n_layer=2, n_head=2, initializer_range=0.2)
        return GPT2LMHeadModel(config).eval().requires_grad_(False)


def base_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Base:
    return Base(model, tokenizer, name="it", source="it", fingerprint=fingerprint(model))


# ---- initialisations that change the base


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("init", ["pissa", "olora", "OLoRA"])
def test_the_bases_weights_make_it_plain(
    init: str, use_rslora: bool, tmp_path: Path, tiny: LlamaForCausalLM, tiny_folder: Path
) -> None:
    config = PeftConfig(
        r=4,
        lora_alpha=6,
        use_rslora=use_rslora,
        init_lora_weights=init,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"down_proj": 7},
    )
    wanted = trained(tiny, tmp_path / "theirs", config)
    done = convert(tmp_path / "theirs", tmp_path / "plain", base=tiny_folder)
    assert {site.r for site in done.adapter.sites.values()} == {8, 14}
    base = Base.load(tiny_folder, dtype="float32", device="cpu")
    plain = routed(base.model, tmp_path / "plain")
    assert torch.allclose(plain, wanted, atol=1e-4, rtol=1e-4)  # W - BA + BA is rounded
    assert not torch.allclose(outputs(base.model), wanted, atol=1e-2)
    peft = PeftModel.from_pretrained(base.model, tmp_path / "plain").eval()
    assert torch.allclose(outputs(peft), plain, atol=1e-5, rtol=1e-5)


def test_weights_that_are_stored_turned_around(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    config = PeftConfig(r=4, init_lora_weights="pissa", target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    wanted = trained(gpt2(), tmp_path / "theirs", config)
    convert(tmp_path / "theirs", tmp_path / "plain", base=base_of(gpt2(), tiny_tokenizer))
    assert torch.allclose(routed(gpt2(), tmp_path / "plain"), wanted, atol=1e-4, rtol=1e-4)


def test_an_embedding_began_plain(tmp_path: Path, tiny: LlamaForCausalLM, tiny_folder: Path) -> None:
    config = PeftConfig(r=4, init_lora_weights="pissa", target_modules=["q_proj", "embed_tokens"])
    wanted = trained(tiny, tmp_path / "theirs", config)
    convert(tmp_path / "theirs", tmp_path / "plain", base=tiny_folder)
    base = Base.load(tiny_folder, dtype="float32", device="cpu")
    assert torch.allclose(routed(base.model, tmp_path / "plain"), wanted, atol=1e-4, rtol=1e-4)
    assert Adapter.load(tmp_path / "plain").sites["model.embed_tokens"].r == 4


@pytest.mark.parametrize("init", ["pissa_niter_4", "corda", "pissa"])
def test_the_first_values_make_it_plain(init: str, tmp_path: Path, tiny: LlamaForCausalLM, tiny_folder: Path) -> None:
    own = {"corda_config": CordaConfig(corda_method="kpm")} if init == "corda" else {}
    config = PeftConfig(r=4, init_lora_weights=init, target_modules=["q_proj", "down_proj"], **own)
    if own:
        preprocess_corda(tiny, config, run_model=lambda: tiny(IDS[:1]))
    wanted = trained(tiny, tmp_path / "theirs", config)
    if init != "pissa":
        with pytest.raises(UnsupportedError, match="not in the folder\nGive the adapter as it was saved before"):
            convert(tmp_path / "theirs", tmp_path / "plain", base=tiny_folder)
    convert(tmp_path / "theirs", tmp_path / "plain", initial=tmp_path / "initial")
    base = Base.load(tiny_folder, dtype="float32", device="cpu")
    assert torch.allclose(routed(base.model, tmp_path / "plain"), wanted, atol=1e-4, rtol=1e-4)


def test_first_values_of_another_adapter_are_refused(tmp_path: Path) -> None:
    made().save(tmp_path / "one")
    made(LoraConfig(r=4)).save(tmp_path / "two")
    with pytest.raises(AdapterError, match="first values are those of another adapter"):
        convert(tmp_path / "one", tmp_path / "plain", initial=tmp_path / "two")
    assert not (tmp_path / "plain").exists()


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ("pissa_niter_16", "random numbers are not in the folder"),
        ("corda", "data that are not in the folder"),
        ("lora_ga", "gradients on data that are not in the folder"),
        ("loftq", "difference from the base's is of full rank"),
    ],
)
def test_what_cannot_be_made_plain_says_why(init: str, message: str, tmp_path: Path, base: Base) -> None:
    rewrite(made().save(tmp_path / "theirs"), init_lora_weights=init)
    with pytest.raises(UnsupportedError, match=message):
        convert(tmp_path / "theirs", tmp_path / "plain", base=base)
    with pytest.raises(UnsupportedError, match="`loradeck convert` makes it a plain LoRA"):
        read_folder(tmp_path / "theirs")  # the refusal is not forgotten once it was read
    assert not (tmp_path / "plain").exists()


def test_a_head_that_shares_its_weight_cannot_be_undone(tmp_path: Path, tiny: LlamaForCausalLM, base: Base) -> None:
    tiny.config.tie_word_embeddings = True
    tiny.tie_weights()
    Adapter.of(LoraConfig(r=4), {"lm_head": (torch.randn(4, 64), torch.randn(260, 4))}).save(tmp_path / "theirs")
    rewrite(tmp_path / "theirs", init_lora_weights="pissa")
    with pytest.raises(UnsupportedError, match="lm_head shares its weight"):
        convert(tmp_path / "theirs", tmp_path / "plain", base=base)


def test_a_base_that_is_not_known_is_asked_for(tmp_path: Path) -> None:
    rewrite(made().save(tmp_path / "theirs"), init_lora_weights="pissa")
    with pytest.raises(ConfigError) as caught:
        convert(tmp_path / "theirs", tmp_path / "plain")
    assert "does not name its base, which is needed to compute what pissa began with" in caught.value.message
    assert (caught.value.python, caught.value.cli) == ("Pass base=.", "Give it with --base.")


def test_a_base_that_does_not_fit_is_refused(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rewrite(made().save(tmp_path / "theirs"), init_lora_weights="pissa")
    with pytest.raises(AdapterError, match="does not fit this base"):
        convert(tmp_path / "theirs", tmp_path / "plain", base=base_of(gpt2(), tiny_tokenizer))


# ---- pickles


def pickled(folder: Path) -> Path:
    """Replace the tensors of an adapter's folder by a pickle, as older PEFTs wrote them."""
    torch.save(load_file(folder / TENSORS), folder / "adapter_model.bin")
    (folder / TENSORS).unlink()
    return folder


@pytest.mark.parametrize("name", ["", "adapter_model.bin"])
def test_a_pickle_becomes_safetensors(name: str, tmp_path: Path) -> None:
    whole = made().save(tmp_path / "poet") / TENSORS
    content = whole.read_bytes()
    folder = pickled(tmp_path / "poet")
    with pytest.raises(UnsupportedError, match="is a pickle, which can run code when opened\n"):
        Adapter.load(folder)
    convert(folder / name, tmp_path / "new")
    assert (tmp_path / "new" / TENSORS).read_bytes() == content
    assert (tmp_path / "new" / CONFIG).read_bytes() == (folder / CONFIG).read_bytes()


class Bomb:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, ("exploded",)


def test_a_pickle_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = pickled(made().save(tmp_path / "poet"))
    torch.save({"base_model.model.x.lora_A.weight": Bomb()}, folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"not a file of tensors by torch\.save"):
        convert(folder, tmp_path / "new")
    assert not (tmp_path / "exploded").exists()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], "it is a list, not a table of tensors"),
        ({"a": {"b": torch.ones(2)}}, "'a' is a dict"),
        ({"a": 3}, "'a' is a int"),
        ({3: torch.ones(2)}, "3 is a Tensor"),
        ({"a": torch.ones(2, dtype=torch.int64)}, "'a' is a tensor of torch.int64"),
        ({"a": torch.ones(2, 2).to_sparse()}, "'a' is a tensor of torch.float32, torch.sparse_coo"),
        ({"a": torch.ones(2, device="meta")}, "'a' is a tensor of torch.float32, torch.strided, on meta"),
        ({"a": torch.ones(1).expand(1 << 40)}, "its tensors take 4398046511104 bytes"),
    ],
)
def test_what_is_no_table_of_tensors_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    folder = pickled(made().save(tmp_path / "poet"))
    torch.save(content, folder / "adapter_model.bin")
    with pytest.raises(AdapterError) as caught:
        convert(folder, tmp_path / "new")
    assert message in str(caught.value)


def test_archives_that_would_take_more_memory_than_their_size_are_refused(tmp_path: Path) -> None:
    folder = pickled(made().save(tmp_path / "poet"))
    file = folder / "adapter_model.bin"
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    with pytest.raises(AdapterError, match="its entries are compressed"):
        convert(folder, tmp_path / "new")
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/data.pkl", bytes(17 << 20))
    with pytest.raises(AdapterError, match="its table of tensors is longer"):
        convert(folder, tmp_path / "new")
    file.write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(AdapterError, match="File is not a zip file"):
        convert(folder, tmp_path / "new")


# ---- one rank and one scaling


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_one_rank_and_one_scaling_keep_the_update(dtype: torch.dtype) -> None:
    adapter = made(dtype=dtype)
    result = uniform(adapter)
    assert {site.r for site in result.sites.values()} == {6}
    assert len({site.scaling for site in result.sites.values()}) == 1
    assert (result.config.r, result.config.rank_pattern, result.config.alpha_pattern) == (6, {}, {})
    for path in adapter.sites:
        wanted = update(adapter, path)
        assert torch.allclose(update(result, path), wanted, rtol=0, atol=1e-6 * float(wanted.abs().max()))


def test_factors_that_are_exact_keep_the_dtype() -> None:
    config = LoraConfig(r=4, lora_alpha=8, alpha_pattern={"q_proj": 16, "k_proj": 0})
    adapter = made(config, torch.bfloat16)
    result = uniform(adapter)
    assert {tensor.dtype for _, tensor in result.tensors()} == {torch.bfloat16}
    assert all(torch.equal(update(result, path), update(adapter, path)) for path in adapter.sites)


def test_an_adapter_that_changes_nothing_has_a_scaling_too() -> None:
    assert {site.scaling for site in uniform(made(LoraConfig(r=4, lora_alpha=0))).sites.values()} == {0.0}


def test_vllms_folder_has_no_patterns(tmp_path: Path) -> None:
    made().save(tmp_path / "poet")
    convert(tmp_path / "poet", tmp_path / "vllm", to="vllm")
    table = json.loads((tmp_path / "vllm" / CONFIG).read_text())
    assert (table["r"], table["rank_pattern"], table["alpha_pattern"], table["use_rslora"]) == (6, {}, {}, False)
    assert {tensor.shape[0] for key, tensor in load_file(tmp_path / "vllm" / TENSORS).items() if "lora_A" in key} == {6}


def test_what_vllm_does_not_take_is_refused(tmp_path: Path) -> None:
    Adapter.of(LoraConfig(r=2), {"conv": (torch.randn(2, 3, 3), torch.randn(4, 2, 1))}).save(tmp_path / "conv")
    with pytest.raises(UnsupportedError, match="conv is a convolution"):
        convert(tmp_path / "conv", tmp_path / "vllm", to="vllm")
    Adapter.of(LoraConfig(r=513), {"x": (torch.randn(513, 4), torch.randn(3, 513))}).save(tmp_path / "high")
    with pytest.raises(UnsupportedError, match="vLLM takes ranks up to 512, this adapter has 513"):
        convert(tmp_path / "high", tmp_path / "vllm", to="vllm")
    assert not (tmp_path / "vllm").exists()
    assert convert(tmp_path / "high", tmp_path / "vllm", to="vllm", rank=4).error < 1e-5


@pytest.mark.skipif(
    not PYTHON, reason="needs pip install vllm, here or in the environment of LORADECK_VLLM=…/bin/python"
)
def test_vllm_reads_the_same_updates(tmp_path: Path) -> None:
    adapter = made()
    adapter.save(tmp_path / "poet")
    convert(tmp_path / "poet", tmp_path / "vllm", to="vllm")
    done = subprocess.run(
        [PYTHON, "-c", VLLM, str(tmp_path / "vllm"), str(tmp_path / "read.safetensors")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    read = load_file(tmp_path / "read.safetensors")
    assert read.keys() == adapter.sites.keys()
    for path, tensor in read.items():
        torch.testing.assert_close(tensor.double(), update(adapter, path), rtol=1e-4, atol=1e-4)


VLLM = """
import sys
from safetensors.torch import save_file
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
folder, file = sys.argv[1:]
config = PEFTHelper.from_local_dir(folder, None)
names = {"q_proj", "k_proj", "o_proj", "up_proj", "down_proj"}
model = LoRAModel.from_local_checkpoint(folder, names, config, lora_model_id=1, device="cpu")
save_file({name: (each.scaling * each.lora_b @ each.lora_a).contiguous() for name, each in model.loras.items()}, file)
"""


# ---- lower ranks


def test_a_rank_is_lowered_to_the_nearest_and_the_error_is_that_of_the_update(tmp_path: Path) -> None:
    adapter = made()
    adapter.save(tmp_path / "poet")
    done = convert(tmp_path / "poet", tmp_path / "low", rank=4)
    low = Adapter.load(tmp_path / "low")
    wanted = {path: update(adapter, path) for path in adapter.sites}
    lost = {path: float((update(low, path) - wanted[path]).square().sum()) for path in wanted}
    whole = {path: float(dense.square().sum()) for path, dense in wanted.items()}
    assert done.error == pytest.approx((sum(lost.values()) / sum(whole.values())) ** 0.5, rel=1e-4)
    q = "model.layers.1.self_attn.q_proj"
    assert done.errors[q] == pytest.approx((lost[q] / whole[q]) ** 0.5, rel=1e-4)
    assert max(done.errors, key=done.errors.__getitem__) == q
    values = torch.linalg.svdvals(wanted[q])
    assert done.errors[q] == pytest.approx(float(values[4:].norm() / values.norm()), rel=1e-4)  # Eckart-Young
    assert {path.rpartition(".")[2]: site.r for path, site in low.sites.items()} == {
        "q_proj": 4, "k_proj": 4, "o_proj": 4, "up_proj": 4, "down_proj": 3,
    }  # fmt: skip
    down = "model.layers.1.mlp.down_proj"
    assert all(torch.equal(*halves) for halves in zip(low.pair(down), adapter.pair(down), strict=True))


def test_a_rank_that_nothing_exceeds_changes_nothing() -> None:
    adapter = made()
    result = lower_rank(adapter, 6)
    assert result.error < 1e-6
    assert all(
        torch.equal(*halves)
        for path in adapter.sites
        for halves in zip(result.adapter.pair(path), adapter.pair(path), strict=True)
    )


@pytest.mark.parametrize("rank", [0, -1, True, 100_000])
def test_a_rank_out_of_range_is_refused(rank: int, tmp_path: Path) -> None:
    made().save(tmp_path / "poet")
    with pytest.raises(ConfigError):
        convert(tmp_path / "poet", tmp_path / "low", rank=rank)


# ---- llama.cpp's files


SHAPES = {
    "blk.1.attn_q.weight": (64, 64),
    "blk.1.attn_k.weight": (32, 64),
    "blk.1.attn_output.weight": (64, 64),
    "blk.1.ffn_up.weight": (96, 64),
    "blk.1.ffn_down.weight": (64, 96),
    "token_embd.weight": (50, 64),
    "output.weight": (50, 64),
}
ARCHITECTURES = [Architecture(name, 4, 2, SHAPES) for name in ("llama", "qwen2")]


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: architecture.name)
def test_a_file_that_was_written_is_read_back(architecture: Architecture, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="needs pip install gguf")
    adapter = made()
    export(adapter, architecture, tmp_path / "poet.gguf")
    result = read(tmp_path / "poet.gguf", architecture)
    assert result.sites.keys() == adapter.sites.keys()
    for path in adapter.sites:
        assert torch.equal(result.pair(path)[0], adapter.pair(path)[0])
        torch.testing.assert_close(update(result, path), update(adapter, path), rtol=1e-5, atol=1e-5)


def test_an_embedding_and_fused_weights_are_read_back(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="needs pip install gguf")
    shapes = {"blk.0.attn_qkv.weight": (96, 64), "blk.0.ffn_up.weight": (80, 64), "token_embd.weight": (50, 64)}
    phi = Architecture("phi3", 4, 2, {**shapes, "output.weight": (50, 64)})
    sizes = {"self_attn.qkv_proj": 96, "mlp.gate_up_proj": 80}
    pairs = {f"model.layers.0.{name}": (torch.randn(2, 64), torch.randn(rows, 2)) for name, rows in sizes.items()}
    Adapter.of(LoraConfig(r=2), pairs).save(tmp_path / "poet")
    tensors = load_file(tmp_path / "poet" / TENSORS)
    for half, shape in (("A", (2, 50)), ("B", (64, 2))):
        tensors[f"base_model.model.model.embed_tokens.lora_embedding_{half}"] = torch.randn(shape)
    save_file(tensors, tmp_path / "poet" / TENSORS)
    rewrite(tmp_path / "poet", target_modules=["qkv_proj", "gate_up_proj", "embed_tokens"])
    adapter = Adapter.load(tmp_path / "poet")
    export(adapter, phi, tmp_path / "poet.gguf")
    result = read(tmp_path / "poet.gguf", phi)
    assert result.sites == adapter.sites
    for path in adapter.sites:
        assert all(torch.equal(*halves) for halves in zip(result.pair(path), adapter.pair(path), strict=True))


def test_files_of_another_base_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="needs pip install gguf")
    llama, qwen = ARCHITECTURES
    export(made(), llama, tmp_path / "poet.gguf")
    with pytest.raises(AdapterError, match="is for 'llama'; this base is qwen2"):
        read(tmp_path / "poet.gguf", qwen)
    small = Architecture("llama", 4, 2, {**SHAPES, "blk.1.ffn_up.weight": (90, 64)})
    with pytest.raises(
        AdapterError, match=r"blk\.1\.ffn_up\.weight has A \(6?4?, 64\) and B \(96, 4\); it is \(90, 64\)"
    ):
        read(tmp_path / "poet.gguf", small)
    fewer = Architecture("llama", 4, 2, {key: shape for key, shape in SHAPES.items() if key != "blk.1.attn_q.weight"})
    with pytest.raises(AdapterError, match=r"blk\.1\.attn_q\.weight is not a weight of this base"):
        read(tmp_path / "poet.gguf", fewer)


@pytest.mark.parametrize(
    ("settings", "tensors", "message"),
    [
        ({"general.type": "model"}, {}, "is not a LoRA file of llama.cpp"),
        ({"adapter.type": "other"}, {}, "is not a LoRA file of llama.cpp"),
        ({"adapter.alora.invocation_tokens": [1, 2]}, {}, "active only after certain tokens"),
        ({"adapter.lora.alpha": float("nan")}, {}, "has an alpha of nan"),
        ({}, {"blk.1.attn_q.weight": (4, 4)}, "is neither a lora_a nor a lora_b"),
        ({}, {"blk.1.attn_k.weight.lora_a": (4, 64)}, "blk.1.attn_k.weight lacks an A or a B"),
    ],
)
def test_files_that_are_no_lora_are_refused(
    settings: dict[str, Any], tensors: dict[str, tuple[int, ...]], message: str, tmp_path: Path
) -> None:
    gguf = pytest.importorskip("gguf", reason="needs pip install gguf")
    written = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 8.0, **settings}
    writer = gguf.GGUFWriter(tmp_path / "poet.gguf", "llama")
    for key, value in written.items():
        add = {str: writer.add_string, float: writer.add_float32, list: writer.add_array}[type(value)]
        add(key, value)
    shapes = {"blk.1.attn_q.weight.lora_a": (4, 64), "blk.1.attn_q.weight.lora_b": (64, 4), **tensors}
    for name, shape in shapes.items():
        writer.add_tensor(name, torch.ones(shape).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(AdapterError) as caught:
        read(tmp_path / "poet.gguf", ARCHITECTURES[0])
    assert message in str(caught.value)


def test_a_file_of_llama_cpp_becomes_a_folder(tmp_path: Path, tiny: LlamaForCausalLM, tiny_folder: Path) -> None:
    pytest.importorskip("gguf", reason="needs pip install gguf")
    bank = Bank(tiny)
    bank.add("poet", MIXED)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in bank.parameters("poet"):
            parameter.normal_(0, 0.2, generator=generator)
    bank.save("poet", tmp_path / "poet")
    bank.detach()
    convert(tmp_path / "poet", tmp_path / "poet.gguf", to="gguf", base=tiny_folder)
    convert(tmp_path / "poet.gguf", tmp_path / "back", base=tiny_folder)
    assert torch.allclose(routed(tiny, tmp_path / "back"), routed(tiny, tmp_path / "poet"), atol=1e-4, rtol=1e-4)
    assert Adapter.load(tmp_path / "back").origin.base_model == str(tiny_folder)


# ---- the page


def test_the_table_of_the_page_is_true(tmp_path: Path, tiny_folder: Path) -> None:
    pytest.importorskip("gguf", reason="needs pip install gguf")
    made().save(tmp_path / "peft")
    q = "model.layers.1.self_attn.q_proj"
    for to in FORMATS:
        if to != "peft":
            convert(tmp_path / "peft", tmp_path / to, to=to, base=tiny_folder)
    pickled(made().save(tmp_path / "pickle"))
    for source in ("pickle", *FORMATS):
        done = convert(tmp_path / source, tmp_path / "in" / source, base=tiny_folder)
        torch.testing.assert_close(update(done.adapter, q), update(made(), q), rtol=1e-4, atol=1e-4)
    tools = {
        "PEFT": ("peft", True),
        "PEFT, as pickles": ("pickle", False),
        "mlx-lm": ("mlx", True),
        "llama.cpp": ("gguf", True),
        "vLLM": ("vllm", True),
    }
    page = (Path(__file__).parent.parent / "docs" / "adapters.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:2] == "| "]
    table = {row[0]: row[2:] for row in rows if row[0] in tools}
    assert {tool: cells[1].startswith("`--to") for tool, cells in table.items()} == {
        tool: writes for tool, (_, writes) in tools.items()
    }
    assert {cells[1] for cells in table.values() if cells[1] != "no"} == {f"`--to {to}`" for to in FORMATS}
    assert {cells[0] for cells in table.values()} == {"yes"}


# ---- folders


def test_pefts_copies_are_compared_and_left_out(tmp_path: Path, tiny: LlamaForCausalLM, tiny_folder: Path) -> None:
    wanted = trained(tiny, tmp_path / "theirs", PeftConfig(r=4, target_modules=["embed_tokens", "q_proj"]))
    convert(tmp_path / "theirs", tmp_path / "plain", base=tiny_folder)
    assert not any("base_layer" in key for key in load_file(tmp_path / "plain" / TENSORS))
    base = Base.load(tiny_folder, dtype="float32", device="cpu")
    assert torch.allclose(routed(base.model, tmp_path / "plain"), wanted, atol=1e-5, rtol=1e-5)
    rewrite(tmp_path / "theirs", base_model_name_or_path=None)
    with pytest.raises(ConfigError, match="which is needed to compare the copies of its weights"):
        convert(tmp_path / "theirs", tmp_path / "never")


def test_modules_of_its_own_go_only_to_peft(tmp_path: Path, tiny: LlamaForCausalLM, tiny_folder: Path) -> None:
    settings = PeftConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    wanted = trained(tiny, tmp_path / "theirs", settings)
    for to in FORMATS:
        if to != "peft":
            with pytest.raises(UnsupportedError, match=f"theirs replaces lm_head, which {to} has no place for\nMerge"):
                convert(tmp_path / "theirs", tmp_path / "never", to=to, base=tiny_folder)
    with pytest.raises(UnsupportedError, match="replaces lm_head, so its rank cannot be lowered"):
        convert(tmp_path / "theirs", tmp_path / "never", rank=2)
    assert not (tmp_path / "never").exists()
    convert(tmp_path / "theirs", tmp_path / "plain")
    base = Base.load(tiny_folder, dtype="float32", device="cpu")
    assert torch.allclose(routed(base.model, tmp_path / "plain"), wanted, atol=1e-5, rtol=1e-5)


def test_what_exists_stays(tmp_path: Path) -> None:
    made().save(tmp_path / "poet")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    for to in ("peft", "mlx", "vllm"):
        with pytest.raises(ConfigError, match="exists and is not empty"):
            convert(tmp_path / "poet", tmp_path / "out", to=to)
    with pytest.raises(ConfigError, match="exists\nGive a new one; nothing was written"):
        convert(tmp_path / "poet", tmp_path / "out" / "mine", to="gguf")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.parametrize("source", ["nowhere", "empty", "text.txt", "x\0y"])
def test_what_is_no_adapter_is_refused(source: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("Hello!")
    with pytest.raises(LoradeckError):
        convert(tmp_path / source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown format 'onnx'\nUse one of peft, mlx, gguf, vllm"):
        convert(tmp_path, tmp_path / "out", to="onnx")  # type: ignore[arg-type]


def rewrite(folder: Path, **settings: object) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
