"""Bases in the blocks of their GGUF file: the same model as transformers', and one clear error for a bad file."""

import json
import logging
import os
import re
import shutil
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.gguf_files import CONFIGS, SCALES, SHAPE, blocks, model_of, rewrite, write
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)

import gguf
from loradeck import Base
from loradeck.base import gguf as base_gguf
from loradeck.base import gguf_model
from loradeck.base.fingerprint import fingerprint
from loradeck.base.gguf_config import config_of
from loradeck.base.gguf_file import GgufFile
from loradeck.base.gguf_model import read_model
from loradeck.base.pretrained import base_errors, quiet
from loradeck.base.quantised import QuantisedEmbedding, QuantisedLinear
from loradeck.errors import BaseModelError

IDS = torch.tensor([[1, 5, 80, 130, 7, 255, 3, 60, 70, 80, 90, 100]])
QUANTS = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "f16", "bf16", "f32")
THEIRS = sorted(CONFIGS.keys() - {"gemma", "granite", "olmo2", "smollm3"})  # that transformers reads
LAST = "blk.3.ffn_down.weight"

Change = Callable[[str, np.ndarray, str], tuple[str, np.ndarray, str] | None]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORADECK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def bpe(bpe_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(bpe_folder)


@pytest.fixture
def tiny_file(bpe: PreTrainedTokenizerBase, tmp_path: Path) -> Path:
    """A tied Llama in Q4_1."""
    return write("llama, tied", "q4_1", bpe, tmp_path)


def in_blocks(file: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    with GgufFile(file) as opened, quiet():
        return read_model(opened, config_of(opened), dtype, in_blocks=True)


def by_transformers(file: Path) -> PreTrainedModel:
    """The de-quantised model, as transformers reads it; its settings of an architecture are sometimes incomplete."""
    with GgufFile(file) as opened:
        config = config_of(opened)
    options = {"quantization_config": transformers.GgufConfig(dequantize=True)}
    with quiet():
        return AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, config=config, dtype=torch.float32, **options
        )


@torch.no_grad()
def assert_same(found: PreTrainedModel, expected: PreTrainedModel) -> None:
    assert type(found).__name__ == type(expected).__name__
    assert fingerprint(found) == fingerprint(expected)
    one, other = found.double()(IDS).logits, expected.double()(IDS).logits  # random weights magnify float32's rounding
    assert float((one - other).norm() / other.norm()) < 1e-5


# ---- the file


def test_the_header_is_as_gguf_reads_it(tiny_file: Path) -> None:
    reader = gguf.GGUFReader(tiny_file)
    with GgufFile(tiny_file) as file:
        assert [*file.settings] == [key for key in reader.fields if not key.startswith("GGUF.")]
        for key, value in file.settings.items():
            if value is not None:  # an array of texts
                assert value == reader.fields[key].contents()
        assert file.settings["tokenizer.ggml.tokens"] is None
        for tensor in reader.tensors:
            entry = file.tensors[tensor.name]
            assert (entry.type, entry.offset, entry.size) == (tensor.tensor_type, tensor.data_offset, tensor.n_bytes)
            assert entry.shape == tuple(reversed(tensor.shape.tolist()))
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
            assert torch.equal(file.values(entry), torch.from_numpy(values.copy()))


# ---- the same model


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("kind", ["llama, tied", "gemma3"])
def test_every_type_is_read_as_by_transformers(
    kind: str, quant: str, bpe: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    file = write(kind, quant, bpe, tmp_path)
    assert_same(in_blocks(file), by_transformers(file))


@pytest.mark.parametrize("kind", THEIRS)
def test_every_architecture_is_read_as_by_transformers(kind: str, bpe: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    file = write(kind, "q5_1", bpe, tmp_path)
    assert_same(in_blocks(file), by_transformers(file))


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_architecture_is_the_plain_model(kind: str, bpe: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    file = write(kind, "f32", bpe, tmp_path)
    model, plain = in_blocks(file), model_of(kind)
    if kind.startswith("gemma"):  # w + 1 - 1 is not always w
        for name, parameter in plain.named_parameters():
            parameter.copy_(parameter + 1 - 1 if name.endswith("norm.weight") else parameter)
    assert_same(model, plain)
    theirs = json.loads((tmp_path / "plain" / "config.json").read_text())
    for name in ("rope_parameters", "tie_word_embeddings", "eos_token_id", "sliding_window", "head_dim", "vocab_size"):
        assert name not in theirs or model.config.to_dict()[name] == theirs[name]
    assert model.config.rms_norm_eps == pytest.approx(theirs["rms_norm_eps"])


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_blocks_are_kept(kind: str, bpe: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    file = write(kind, "q4_1", bpe, tmp_path)
    model = in_blocks(file)
    assert isinstance(model.get_input_embeddings(), QuantisedEmbedding)
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert all(isinstance(module, QuantisedLinear) for module in layers)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == model.config.tie_word_embeddings
    assert not any(each.is_meta for each in (*model.parameters(), *model.buffers()))
    assert not any(each.requires_grad for each in model.parameters())


@pytest.mark.parametrize("kind", SCALES)
def test_every_type_of_block_in_one_file(kind: str, tiny_file: Path, tmp_path: Path) -> None:
    others = [*SCALES]

    def tensor(name: str, data: np.ndarray, was: str) -> tuple[str, np.ndarray, str]:
        if data.ndim < 2:
            return name, data, was
        at = sum(map(ord, name))
        new = kind if "attn" in name else others[at % len(others)]
        inputs = SHAPE["intermediate_size" if "ffn_down" in name else "hidden_size"]
        return name, blocks(new, len(data), inputs, seed=at), new

    file = rewrite(tiny_file, tmp_path / "mixed.gguf", tensor=tensor)
    assert_same(in_blocks(file), by_transformers(file))


def test_half_precision_is_what_is_not_in_blocks(tiny_file: Path) -> None:
    model = in_blocks(tiny_file, torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert {each.dtype for each in model.parameters()} == {torch.bfloat16, torch.uint8}
    expected = by_transformers(tiny_file)
    assert fingerprint(model) == fingerprint(expected.bfloat16())
    with torch.no_grad():
        one, other = model(IDS).logits.float(), expected(IDS).logits.float()
    assert float((one - other).norm() / other.norm()) < 0.05


def _llama3(context: int) -> LlamaForCausalLM:
    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": context,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "head_dim": 64}, rope_parameters=rope))
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("context", [128, 8192])
def test_the_rope_of_llama_3(context: int, bpe: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    from loradeck.gguf.model import Merge, Model, export

    model = _llama3(context)
    model.save_pretrained(tmp_path / "plain")
    bpe.save_pretrained(tmp_path / "plain")
    export(Model.open(str(tmp_path / "plain")), Merge(), tmp_path / "tiny.gguf", "f32")
    result = in_blocks(tmp_path / "tiny.gguf")
    assert result.config.rope_parameters == model.config.rope_parameters
    assert_same(result, model)


def test_factors_unlike_llama_3s_are_refused(bpe: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    file = write("llama", "f32", bpe, tmp_path)

    def tensor(name: str, data: np.ndarray, was: str) -> tuple[str, np.ndarray, str]:
        return (
            ("rope_freqs.weight", np.linspace(1, 3, 16, dtype=np.float32), was) if name == LAST else (name, data, was)
        )

    with pytest.raises(BaseModelError, match=r"rope_freqs\.weight unlike that of Llama 3"):
        in_blocks(rewrite(file, tmp_path / "new.gguf", tensor=tensor))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 64},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        ),
    ],
)
def test_scaled_rope(given: dict[str, object], expected: dict[str, object], tiny_file: Path, tmp_path: Path) -> None:
    settings = {f"llama.rope.scaling.{key}": value for key, value in given.items()}
    with GgufFile(rewrite(tiny_file, tmp_path / "new.gguf", settings=settings)) as file:
        assert config_of(file).rope_parameters.items() >= expected.items()
    with (
        GgufFile(rewrite(tiny_file, tmp_path / "bad.gguf", settings={"llama.rope.scaling.type": "spiral"})) as file,
        pytest.raises(BaseModelError, match="'spiral'"),
    ):
        config_of(file)


def test_the_long_rope_of_phi3(bpe: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    file = write("phi3", "f32", bpe, tmp_path)
    factors = {"rope_factors_long": 4.0, "rope_factors_short": 1.5}

    reader, writer = gguf.GGUFReader(file), gguf.GGUFWriter(tmp_path / "new.gguf", "phi3")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            kinds = field.types
            writer.add_key_value(key, field.contents(), kinds[0], sub_type=kinds[-1] if len(kinds) > 1 else None)
    writer.add_uint32("phi3.rope.scaling.original_context_length", 64)
    for name, value in factors.items():
        writer.add_tensor(f"{name}.weight", np.full(16, value, dtype=np.float32))
    for each in reader.tensors:
        writer.add_tensor(each.name, each.data, raw_dtype=each.tensor_type)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    model = in_blocks(tmp_path / "new.gguf")
    rope = model.config.rope_parameters
    assert (rope["rope_type"], rope["long_factor"], rope["short_factor"]) == ("longrope", [4.0] * 16, [1.5] * 16)
    assert rope["original_max_position_embeddings"] == 64
    theirs = model_of("phi3")
    config = {**theirs.config.to_dict(), "rope_parameters": rope, "original_max_position_embeddings": 64}
    expected = type(theirs)(type(theirs.config).from_dict(config)).eval()
    expected.load_state_dict(theirs.state_dict())
    assert_same(model, expected)


# ---- Base.load


def test_load_keeps_the_blocks_and_stores_no_weights(tiny_file: Path, cache: Path) -> None:
    base = Base.load(tiny_file, device="cpu")
    assert isinstance(base.model.get_input_embeddings(), QuantisedEmbedding)
    assert (base.name, base.source, base.context) == ("tiny", str(tiny_file), 256)
    assert base.fingerprint == base.model.fingerprint == Base.load(tiny_file, dtype="float32", device="cpu").fingerprint
    assert not base.model.training
    assert base.model.generation_config.eos_token_id == 2
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    paths = [path for path in cache.rglob("*") if "-tokenizer" in str(path) and path.is_file()]
    assert paths
    assert not any(path.suffix == ".safetensors" for path in paths)


def test_the_tokenizer_is_that_of_transformers(tiny_file: Path, bpe: PreTrainedTokenizerBase) -> None:
    base = Base.load(tiny_file, device="cpu")
    theirs = AutoTokenizer.from_pretrained(tiny_file.parent, gguf_file=tiny_file.name)
    for text in ("Hi, it's 2024 that!", "<|im_start|>user\nnaïve<|im_end|>"):
        ids = base.tokenizer(text)["input_ids"]
        assert ids == theirs(text)["input_ids"] == bpe(text)["input_ids"]
    assert base.tokenizer.chat_template == theirs.chat_template == bpe.chat_template
    assert (base.tokenizer.eos_token, base.tokenizer.bos_token) == (theirs.eos_token, theirs.bos_token)
    assert base.tokenizer.added_tokens_decoder == theirs.added_tokens_decoder
    assert base.tokenizer.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()


def test_the_file_is_not_needed_after_the_load(tiny_file: Path) -> None:
    base = Base.load(tiny_file, device="cpu")
    with torch.no_grad():
        before = base.model(IDS).logits
        os.truncate(tiny_file, 100)
        tiny_file.unlink()
        assert torch.equal(base.model(IDS).logits, before)


def test_the_second_load_reads_no_vocabulary(tiny_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Base.load(tiny_file, device="cpu")

    def never(*_: object, **__: object) -> None:
        pytest.fail("read again")

    monkeypatch.setattr(base_gguf, "new_folder", never)
    monkeypatch.setattr(gguf, "GGUFReader", never)
    second = Base.load(tiny_file.rename(tiny_file.with_name("moved.gguf")), device="cpu")
    assert (second.name, second.fingerprint) == ("moved", first.fingerprint)


def test_no_vocabulary_is_parsed_in_python(tiny_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Base.load(tiny_file, device="cpu")
    load, names = json.load, []

    def watched(file: Any, **options: Any) -> object:
        names.append(Path(file.name).name)
        return load(file, **options)

    monkeypatch.setattr(json, "load", watched)
    Base.load(tiny_file, device="cpu")
    assert "tokenizer_config.json" in names
    assert "tokenizer.json" not in names


def test_another_header_has_another_tokenizer(tiny_file: Path, tmp_path: Path) -> None:
    first = Base.load(tiny_file, device="cpu")
    other = rewrite(tiny_file, tmp_path / "other.gguf", settings={"tokenizer.chat_template": "another"})
    assert first.tokenizer.chat_template != "another"
    assert Base.load(other, device="cpu").tokenizer.chat_template == "another"


def test_the_tokenizer_alone(tiny_file: Path, bpe: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_gguf, "read_model", lambda *_, **__: pytest.fail("read the model"))
    assert base_gguf.gguf_tokenizer(tiny_file)("that")["input_ids"] == bpe("that")["input_ids"]


@pytest.mark.parametrize("weights", ["packed", "blocks"])
def test_other_formats_leave_the_blocks(weights: str, tiny_file: Path) -> None:
    base = Base.load(tiny_file, device="cpu", weights=weights)  # type: ignore[arg-type]
    assert isinstance(base.model.model.layers[0].mlp.up_proj, QuantisedLinear)
    assert isinstance(base.model.get_input_embeddings(), QuantisedEmbedding)


def test_what_blocks_cannot_hold_is_de_quantised(
    tiny_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rare = gguf.GGMLQuantizationType.TQ2_0

    def tensor(name: str, data: np.ndarray, was: str) -> tuple[str, np.ndarray, str]:
        if name != LAST:
            return name, data, was
        values = np.zeros((SHAPE["hidden_size"], SHAPE["intermediate_size"]), dtype=np.float32)
        return name, gguf.quantize(values, rare), rare.name

    file = rewrite(tiny_file, tmp_path / "rare.gguf", tensor=tensor)
    with caplog.at_level(logging.INFO, logger="loradeck"):
        base = Base.load(file, device="cpu")
    assert "is de-quantised: it has tensors of type TQ2_0" in caplog.text
    assert type(base.model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    caplog.clear()
    monkeypatch.setattr(gguf_model, "why_not_quantised", lambda: "there is no compiler")
    with caplog.at_level(logging.INFO, logger="loradeck"):
        assert type(Base.load(tiny_file, device="cpu").model.get_input_embeddings()) is torch.nn.Embedding
    assert "is de-quantised: there is no compiler" in caplog.text


def test_other_architectures_are_de_quantised_by_transformers(
    tiny_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = Starcoder2Config(**{**SHAPE, "num_hidden_layers": 1}, sliding_window=None, tie_word_embeddings=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Starcoder2ForCausalLM(config).bfloat16().float().eval()
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "starcoder2")
    for key, field in gguf.GGUFReader(tiny_file).fields.items():
        if key.startswith("tokenizer."):
            kinds = field.types
            writer.add_key_value(key, field.contents(), kinds[0], sub_type=kinds[-1] if len(kinds) > 1 else None)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_eps(config.norm_epsilon)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.STARCODER2, 1)
    for path, parameter in model.named_parameters():
        writer.add_tensor(names.get_name(path, try_suffixes=(".weight", ".bias")), parameter.detach().numpy())
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    with caplog.at_level(logging.INFO, logger="loradeck"):
        base = Base.load(tmp_path / "other.gguf", device="cpu")
    assert "is de-quantised: its architecture is starcoder2" in caplog.text
    assert base.fingerprint == fingerprint(model)
    assert base_gguf.gguf_tokenizer(tmp_path / "other.gguf")("that")["input_ids"] == base.tokenizer("that")["input_ids"]


def test_an_olmo_3_is_no_olmo_2(bpe: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    settings = {"olmo2.attention.sliding_window": 8}
    with GgufFile(rewrite(write("olmo2", "f32", bpe, tmp_path), tmp_path / "new.gguf", settings=settings)) as file:
        assert base_gguf.why_no_config(file) == "its architecture is OLMo 3"


# ---- split sets


def split(file: Path, count: int) -> list[Path]:
    """The parts of a file, as llama-gguf-split writes them: the metadata is in the first."""
    reader = gguf.GGUFReader(file)
    names = [tensor.name for tensor in reader.tensors]
    files = []
    for part in range(count):
        mine = set(names[part * len(names) // count : (part + 1) * len(names) // count])
        drop = {key: None for key in reader.fields if part and not key.startswith("GGUF.")}
        numbers = {"split.no": part, "split.count": count, "split.tensors.count": len(names)}
        path = file.with_name(f"{file.stem}-{part + 1:05}-of-{count:05}.gguf")
        files.append(
            rewrite(
                file,
                path,
                settings={**drop, **numbers},
                tensor=lambda *each, mine=mine: each if each[0] in mine else None,
            )
        )
    return files


@pytest.mark.parametrize("given", [0, 2])
def test_a_split_set(given: int, tiny_file: Path) -> None:
    parts = split(tiny_file, 3)
    base = Base.load(parts[given], device="cpu")
    assert base.name == "tiny"
    assert base.fingerprint == Base.load(tiny_file, device="cpu").fingerprint
    assert base.fingerprint == Base.load(parts[given], dtype="float32", device="cpu").fingerprint


def test_missing_parts_are_named(tiny_file: Path) -> None:
    parts = split(tiny_file, 4)
    parts[1].unlink()
    parts[3].unlink()
    with pytest.raises(BaseModelError, match="is one of 4 parts, and others are missing") as caught:
        Base.load(parts[0], device="cpu")
    assert caught.value.problems == (parts[1].name, parts[3].name)
    with pytest.raises(BaseModelError, match="it is one of 4 parts: name it"):
        Base.load(parts[0].rename(tiny_file.with_name("other.gguf")), device="cpu")


def test_parts_of_different_sets_are_refused(tiny_file: Path) -> None:
    parts = split(tiny_file, 3)
    shutil.copy(parts[2], parts[1])
    with pytest.raises(BaseModelError, match=r"split.no of tiny-00002-of-00003.gguf is 2, not 1.*is there twice"):
        Base.load(parts[0], device="cpu")


# ---- bad files


def _refused(file: Path, words: str) -> BaseModelError:
    """Every way to load it gives one error, which names the file and has a hint."""
    for options in ({}, {"dtype": "float32"}):
        with pytest.raises(BaseModelError, match=words) as caught:
            Base.load(file, device="cpu", **options)  # type: ignore[arg-type]
        assert str(file) in caught.value.message
        assert caught.value.hint
    return caught.value


@pytest.mark.parametrize(
    ("size", "words"), [(0, "ends within"), (3, "ends within"), (20, "ends within"), (900, "ends within")]
)
def test_a_header_cut_short(size: int, words: str, tiny_file: Path) -> None:
    os.truncate(tiny_file, size)
    _refused(tiny_file, words)


def test_data_cut_short(tiny_file: Path) -> None:
    os.truncate(tiny_file, tiny_file.stat().st_size // 2)
    (problem,) = _refused(tiny_file, "is damaged").problems
    words = r"tiny\.gguf has \d+ bytes, and \d+ tensors end after them, the last at byte \d+: output_norm\.weight"
    assert re.fullmatch(words, problem)


def _without(*names: str) -> Change:
    return lambda name, data, kind: None if name in names else (name, data, kind)


def test_missing_tensors_are_all_named(tiny_file: Path, tmp_path: Path) -> None:
    names = ("blk.1.attn_q.weight", "output_norm.weight")
    error = _refused(
        rewrite(tiny_file, tmp_path / "new.gguf", tensor=_without(*names)), "does not have the tensors of its Llama"
    )
    assert set(error.problems) == {
        "blk.1.attn_q.weight is missing, for model.layers.1.self_attn.q_proj.weight",
        "output_norm.weight is missing, for model.norm.weight",
    }
    _refused(
        rewrite(tiny_file, tmp_path / "e.gguf", tensor=_without("token_embd.weight")), "token_embd.weight is missing"
    )


def test_tensors_without_a_place_are_named(tiny_file: Path, tmp_path: Path) -> None:
    def tensor(name: str, data: np.ndarray, kind: str) -> tuple[str, np.ndarray, str]:
        return (name.replace("ffn_up", "ffn_xy") if name.startswith("blk.1") else name), data, kind

    error = _refused(rewrite(tiny_file, tmp_path / "new.gguf", tensor=tensor), "does not have the tensors")
    assert error.problems[0] == "blk.1.ffn_xy.weight has no place"


def test_another_shape_is_named(tiny_file: Path, tmp_path: Path) -> None:
    def tensor(name: str, data: np.ndarray, kind: str) -> tuple[str, np.ndarray, str]:
        return name, data[:-32] if name == LAST else data, kind

    error = _refused(rewrite(tiny_file, tmp_path / "new.gguf", tensor=tensor), "does not have the tensors")
    assert error.problems == (f"{LAST} is (224, 512), not (256, 512) as model.layers.3.mlp.down_proj.weight",)


def test_an_unknown_type_is_named(tiny_file: Path) -> None:
    content = tiny_file.read_bytes()
    at = content.index(LAST.encode()) + len(LAST) + 4 + 2 * 8
    assert struct.unpack_from("<I", content, at)[0] == gguf.GGMLQuantizationType.Q4_1
    tiny_file.write_bytes(content[:at] + struct.pack("<I", 250) + content[at + 4 :])
    assert _refused(tiny_file, "is damaged").problems == (f"{LAST} has the unknown type 250",)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("llama.block_count", 2**31, "llama.block_count is 2147483648"),
        ("llama.block_count", 3, "says that it has 3 layers, and has 4"),
        ("llama.embedding_length", 2**31, "llama.embedding_length is 2147483648"),
        ("llama.embedding_length", None, "llama.embedding_length is missing"),
        ("llama.attention.head_count", 2**31, "llama.attention.head_count is"),
        ("llama.attention.head_count", 7, "tiny"),
        ("llama.attention.head_count", 0, "tiny"),
        ("llama.attention.key_length", 2**31, "llama.attention.key_length is"),
        ("llama.rope.dimension_count", 2**31, "llama.rope.dimension_count is"),
        ("llama.feed_forward_length", 100, r"blk\.0\.ffn_\w+\.weight is"),
        ("llama.feed_forward_length", "many", "llama.feed_forward_length is 'many'"),
        ("general.alignment", 3, "general.alignment is 3"),
    ],
)
def test_settings_that_lie(key: str, value: object, words: str, tiny_file: Path, tmp_path: Path) -> None:
    plain = {"general.alignment": 32} if key == "general.alignment" else {}  # which gguf itself would obey
    new = rewrite(tiny_file, tmp_path / "tiny-new.gguf", settings=plain or {key: value})
    if plain:
        content = new.read_bytes()
        at = content.index(b"general.alignment") + len("general.alignment") + 4
        new.write_bytes(content[:at] + struct.pack("<I", 3) + content[at + 4 :])
    _refused(new, words)


@pytest.mark.parametrize(
    ("at", "words"), [(8, "claims 1152921504606846976 tensors"), (16, "1152921504606846976 settings")]
)
def test_counts_that_lie(at: int, words: str, tiny_file: Path) -> None:
    content = tiny_file.read_bytes()
    tiny_file.write_bytes(content[:at] + struct.pack("<Q", 2**60) + content[at + 8 :])
    _refused(tiny_file, words)


def test_lengths_that_lie(tiny_file: Path) -> None:
    content = tiny_file.read_bytes()
    key = b"tokenizer.ggml.tokens"
    at = content.index(key) + len(key) + 8
    for where, words in ((at, "an array of"), (at + 8, "ends within its header"), (24, "a text of")):
        tiny_file.write_bytes(content[:where] + struct.pack("<Q", 2**60) + content[where + 8 :])
        _refused(tiny_file, words)


def test_a_swapped_byte_order_is_named(tiny_file: Path) -> None:
    content = tiny_file.read_bytes()
    tiny_file.write_bytes(content[:4] + content[4:8][::-1] + content[8:])
    _refused(tiny_file, "big-endian")


@pytest.mark.parametrize("change", ["shorter", "written to"])
def test_a_file_that_changes_while_it_is_read(change: str, tiny_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = gguf_model.pack

    def change_and_pack(*args: object) -> object:
        if change == "shorter":
            os.truncate(tiny_file, 20_000)
        else:
            os.utime(tiny_file, ns=(0, 0))
        return pack(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(gguf_model, "pack", change_and_pack)
    with pytest.raises(BaseModelError, match=r"tiny\.gguf changed while it was read"):
        Base.load(tiny_file, device="cpu")


def test_a_file_that_vanishes_while_it_is_read(tiny_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = gguf_model.pack

    def remove_and_pack(*args: object) -> object:
        tiny_file.unlink(missing_ok=True)
        return pack(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(gguf_model, "pack", remove_and_pack)
    assert Base.load(tiny_file, device="cpu").fingerprint


def test_nothing_stays_open(tiny_file: Path) -> None:
    def handles() -> set[str]:
        return {str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.exists()}

    Base.load(tiny_file, device="cpu")
    assert str(tiny_file) not in handles()
    os.truncate(tiny_file, 100)
    with pytest.raises(BaseModelError):
        Base.load(tiny_file, device="cpu")
    assert str(tiny_file) not in handles()


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerBase) -> tuple[bytes, int]:
    """The bytes of a file, and where its data begins."""
    definition = json.loads(tiny_tokenizer.backend_tokenizer.to_str())
    definition["model"]["vocab"]["th"] = len(tiny_tokenizer)
    definition["model"]["merges"] = [["t", "h"]]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(definition)))
    file = write("llama, tied", "q4_1", tokenizer, tmp_path_factory.mktemp("sound"))
    return file.read_bytes(), gguf.GGUFReader(file).data_offset


@settings(max_examples=300)
@given(data=st.data())
def test_no_header_crashes(
    data: st.DataObject, sound: tuple[bytes, int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    content, end = sound
    changes = data.draw(st.lists(st.tuples(st.integers(0, end - 1), st.integers(0, 255)), max_size=4))
    length = data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))
    damaged = bytearray(content)
    for at, value in changes:
        damaged[at] = value
    file = tmp_path_factory.getbasetemp() / "damaged.gguf"
    file.write_bytes(damaged[:length])
    with suppress(BaseModelError), base_errors(file), GgufFile(file) as opened, quiet():
        if base_gguf.why_no_config(opened) is None:
            in_blocks = gguf_model.why_not_in_blocks(opened) is None
            model = read_model(opened, config_of(opened), torch.float32, in_blocks=in_blocks)
            assert not any(each.is_meta for each in model.parameters())


# ---- the real ones


@pytest.mark.real
def test_smollm2_is_what_transformers_reads(smollm2: Base) -> None:
    from loradeck.base.load import SMOLLM2, smollm2_file

    file = smollm2_file()
    assert file is not None
    base = Base.load(SMOLLM2, device="cpu")
    assert isinstance(base.model.get_output_embeddings(), QuantisedLinear)
    assert base.fingerprint == smollm2.fingerprint
    assert base.tokenizer("12 é")["input_ids"] == [33, 34, 26411]
    theirs = AutoConfig.from_pretrained(file.parent, gguf_file=file.name).to_dict()
    ours = base.model.config.to_dict()
    assert {key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key)} <= {
        "_model_name_or_path", "unk_token_id", "dtype", "architectures", "_name_or_path",
    }  # fmt: skip
