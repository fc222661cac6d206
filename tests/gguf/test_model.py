"""Bases and merged models as GGUF files: read back, they are the merged model. tests/lora/test_llamacpp.py runs them."""

from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest
import torch
from tests.conftest import CHAT_TEMPLATE
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from loradeck import Bank, Base, LoraConfig
from loradeck.errors import AdapterError, BaseModelError, UnsupportedError
from loradeck.gguf.model import Merge, Model, export, load_adapters
from loradeck.llamacpp import EMBEDDING, HEAD

gguf = pytest.importorskip("gguf", reason="needs pip install gguf")

IDS = torch.tensor([[5, 80, 130, 7, 259, 3]])
# The largest error of a weight, as a share of the largest in its block of 32.
ERRORS = {
    "f32": 0,
    "f16": 2**-11,
    "bf16": 2**-8,
    "q8_0": 1 / 127,
    "q5_1": 1 / 15,
    "q5_0": 1 / 15,
    "q4_k": 1 / 7,
    "q4_1": 1 / 7,
    "q4_0": 1 / 7,
}


@pytest.fixture
def poet(bpe_folder: Path, tmp_path: Path) -> Path:
    """An adapter of the tiny base, on all linear layers."""
    base = Base.load(bpe_folder, dtype="float32", device="cpu")
    bank = Bank(base.model)
    bank.add("poet", LoraConfig(r=4))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in bank.parameters("poet"):
            parameter.normal_(0, 0.2, generator=generator)
    return bank.save("poet", tmp_path / "poet")


def tensors(file: Path) -> dict[str, Tensor]:
    return {
        each.name: torch.from_numpy(gguf.dequantize(each.data, each.tensor_type).copy())
        for each in gguf.GGUFReader(file).tensors
    }


def header(file: Path) -> dict[str, object]:
    return {key: field.contents() for key, field in gguf.GGUFReader(file).fields.items()}


def test_a_merged_adapters_own_template_is_the_files(bpe_folder: Path, poet: Path, tmp_path: Path) -> None:
    (poet / "chat_template.jinja").write_text("{{ messages[0].content }}")
    model = Model.open(str(bpe_folder))
    export(model, load_adapters(model, {str(poet): 1.0}), tmp_path / "poet.gguf", "f32")
    assert header(tmp_path / "poet.gguf")["tokenizer.chat_template"] == "{{ messages[0].content }}"
    export(model, Merge(), tmp_path / "base.gguf", "f32")
    assert header(tmp_path / "base.gguf")["tokenizer.chat_template"] == CHAT_TEMPLATE


def merged(folder: Path, adapters: dict[Path, float]) -> Base:
    base = Base.load(folder, dtype="float32", device="cpu")
    bank = Bank(base.model)
    bank.merge({bank.load(adapter): weight for adapter, weight in adapters.items()})
    return base


@torch.no_grad()
@pytest.mark.parametrize("quant", ERRORS)
def test_the_weights_are_the_merged_ones_within_the_types_error(
    quant: str, bpe_folder: Path, poet: Path, tmp_path: Path
) -> None:
    model = Model.open(str(bpe_folder))
    export(model, load_adapters(model, {str(poet): 0.5}), tmp_path / "out.gguf", quant)
    base = merged(bpe_folder, {poet: 0.5})
    found = tensors(tmp_path / "out.gguf")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    expected = {path: each for path, each in base.model.named_parameters() if not path.startswith("loradeck")}
    assert len(found) == len(expected)
    for path, weight in expected.items():
        name = names.get_name(path, try_suffixes=(".weight",))
        value = model.architecture.reorder(name, weight)
        error = 0 if value.dim() == 1 else ERRORS["q8_0" if quant[0] == "q" and name in (EMBEDDING, HEAD) else quant]
        scale = value.abs().max()
        assert (found[name] - value).abs().max() <= error * scale * 1.01 + 1e-6


@torch.no_grad()
@pytest.mark.parametrize("quant", ["bf16", "q8_0"])
def test_the_file_loads_as_the_merged_model(quant: str, bpe_folder: Path, poet: Path, tmp_path: Path) -> None:
    model = Model.open(str(bpe_folder))
    export(model, load_adapters(model, {str(poet): 1.0}), tmp_path / "out.gguf", quant)
    base = merged(bpe_folder, {poet: 1.0})
    loaded = Base.load(tmp_path / "out.gguf", dtype="float32", device="cpu")
    expected, found = base.model(IDS).logits, loaded.model(IDS).logits
    error = (found - expected).norm() / expected.norm()
    assert error < {"bf16": 0.05, "q8_0": 0.15}[quant]  # of a random model, the most sensitive kind
    plain = Base.load(bpe_folder, dtype="float32", device="cpu").model(IDS).logits
    assert (plain - expected).norm() / expected.norm() > 2 * error
    for text in ("Hi, it's 2024!", "<|im_start|>user\nnaïve<|im_end|>"):
        assert loaded.tokenizer(text)["input_ids"] == base.tokenizer(text)["input_ids"]
    assert loaded.tokenizer.chat_template == base.tokenizer.chat_template
    assert loaded.tokenizer.eos_token_id == base.tokenizer.eos_token_id


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["q_proj"]])
def test_a_tied_head_is_written_once_it_differs(
    targets: list[str], tiny: LlamaForCausalLM, bpe_folder: Path, tmp_path: Path
) -> None:
    tiny.config.tie_word_embeddings = True
    tiny.tie_weights()
    tiny.save_pretrained(tmp_path / "tied")
    copytree(bpe_folder, tmp_path / "tied", dirs_exist_ok=True, ignore=ignore_patterns("config.json", "*.safetensors"))
    bank = Bank(tiny)
    bank.add("poet", LoraConfig(r=4, target_modules=targets))
    with torch.no_grad():
        for parameter in bank.parameters("poet"):
            parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(0))
    bank.save("poet", tmp_path / "poet")
    bank.detach()
    model = Model.open(str(tmp_path / "tied"))
    export(model, Merge(), tmp_path / "base.gguf", "f32")
    assert HEAD not in tensors(tmp_path / "base.gguf")
    export(model, load_adapters(model, {str(tmp_path / "poet"): 1.0}), tmp_path / "out.gguf", "f32")
    found, base = tensors(tmp_path / "out.gguf"), merged(tmp_path / "tied", {tmp_path / "poet": 1.0})
    torch.testing.assert_close(found[EMBEDDING], base.model.get_input_embeddings().weight)
    assert (HEAD in found) == (targets != ["q_proj"])
    if HEAD in found:
        torch.testing.assert_close(found[HEAD], base.model.get_output_embeddings().weight)


@torch.no_grad()
def test_q4_k_is_q5_0_where_rows_are_no_whole_blocks(bpe_folder: Path, tmp_path: Path) -> None:
    config = LlamaConfig.from_pretrained(
        bpe_folder, hidden_size=256, intermediate_size=320
    )  # heads of 16: o has 64 inputs
    model = LlamaForCausalLM(config)
    model.save_pretrained(bpe_folder)
    types = export(Model.open(str(bpe_folder)), Merge(), tmp_path / "out.gguf", "q4_k")
    assert types == {"q4_k": 2 * 5, "q5_0": 2 * 2, "q8_0": 2}
    read = {each.name: each.tensor_type.name for each in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert (read["blk.1.ffn_up.weight"], read["blk.1.ffn_down.weight"], read[HEAD]) == ("Q4_K", "Q5_0", "Q8_0")
    weight, found = model.model.layers[1].mlp.up_proj.weight, tensors(tmp_path / "out.gguf")["blk.1.ffn_up.weight"]
    assert (found - weight).norm() < 0.08 * weight.norm()


@pytest.mark.parametrize("quant", ["q8_0", "q5_1", "q5_0", "q4_k", "q4_1", "q4_0"])
def test_a_weight_beyond_the_scales_of_a_type_is_named(
    quant: str, bpe_folder: Path, tmp_path: Path, tiny: LlamaForCausalLM
) -> None:
    with torch.no_grad():
        tiny.model.layers[0].mlp.up_proj.weight[3, 5] = 1e9
    tiny.save_pretrained(bpe_folder)
    before = set(tmp_path.iterdir())
    with pytest.raises(BaseModelError, match=r"blk\.0\.ffn_up\.weight has values beyond the range of"):
        export(Model.open(str(bpe_folder)), Merge(), tmp_path / "out.gguf", quant)
    assert set(tmp_path.iterdir()) == before


def test_the_header_says_what_llama_cpp_needs(
    bpe_folder: Path, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    export(Model.open(str(bpe_folder)), Merge(), tmp_path / "out.gguf", "q8_0")
    assert (
        header(tmp_path / "out.gguf").items()
        >= {
            "general.architecture": "llama",
            "general.name": "bpe",
            "llama.context_length": 256,
            "llama.attention.head_count_kv": 2,
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.add_bos_token": False,
            "tokenizer.chat_template": tiny_tokenizer.chat_template,
        }.items()
    )


def test_a_sentencepiece_vocabulary_has_scores(
    tiny: LlamaForCausalLM, spaced_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = LlamaConfig.from_dict({**tiny.config.to_dict(), "vocab_size": len(spaced_tokenizer)})
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    spaced_tokenizer.save_pretrained(tmp_path / "base")
    export(Model.open(str(tmp_path / "base")), Merge(), tmp_path / "out.gguf", "f32")
    found = header(tmp_path / "out.gguf")
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.add_space_prefix"]) == ("llama", True)
    scores = dict(zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.scores"], strict=True))  # type: ignore[call-overload]
    assert scores["▁a"] > scores["▁b"] > scores["▁c"] > scores["a"]


def test_what_llama_cpp_would_not_compute_is_refused(bpe_folder: Path, tmp_path: Path, tiny: LlamaForCausalLM) -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 128}
    settings = {**tiny.config.to_dict(), "hidden_act": "relu", "rope_parameters": yarn}
    LlamaConfig.from_dict(settings).save_pretrained(bpe_folder)
    with pytest.raises(UnsupportedError) as caught:
        Model.open(str(bpe_folder))
    assert caught.value.problems == ("rope_type='yarn'", "hidden_act='relu'")


def test_what_cannot_be_read_is_named(bpe_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="no base at"):
        Model.open("nowhere")
    (bpe_folder / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(BaseModelError, match=r"cannot read .*bpe"):
        Model.open(str(bpe_folder))


def test_a_merge_that_overflows_leaves_no_file(bpe_folder: Path, poet: Path, tmp_path: Path) -> None:
    model = Model.open(str(bpe_folder))
    before = set(tmp_path.iterdir())
    with pytest.raises(AdapterError, match="beyond float16's range"):
        export(model, load_adapters(model, {str(poet): 1e6}), tmp_path / "out.gguf", "f16")
    assert set(tmp_path.iterdir()) == before


def test_an_adapter_of_another_base_is_refused(bpe_folder: Path, poet: Path, tiny: LlamaForCausalLM) -> None:
    with torch.no_grad():
        tiny.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    tiny.save_pretrained(bpe_folder)
    with pytest.raises(AdapterError, match="trained on another base"):
        load_adapters(Model.open(str(bpe_folder)), {str(poet): 1.0})


def test_a_digit_split_has_its_own_name(tmp_path: Path, bpe_folder: Path) -> None:
    from tokenizers import Regex, pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bpe_folder)
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for splits, name in (
        ([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)], "smollm"),
        ([pre_tokenizers.Split(Regex(r"\s"), "isolated"), bytes_only], None),
    ):
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
        tokenizer.save_pretrained(bpe_folder)
        (tmp_path / "out.gguf").unlink(missing_ok=True)
        if name is None:
            with pytest.raises(UnsupportedError, match="it splits texts by"):
                export(Model.open(str(bpe_folder)), Merge(), tmp_path / "out.gguf", "f32")
        else:
            export(Model.open(str(bpe_folder)), Merge(), tmp_path / "out.gguf", "f32")
            assert header(tmp_path / "out.gguf")["tokenizer.ggml.pre"] == name
