"""A multimodal checkpoint is loaded as its language model, of every family: its logits, its files, what is wrong."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.multimodal import FAMILIES, OTHERS, SUPPORT, VOCABULARY, text_logits, whole
from transformers import PreTrainedTokenizerFast

from loradeck import Base
from loradeck.errors import BaseModelError, LoradeckError

IDS = torch.randint(3, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(1))
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[..., Path]:
    """Return a function that saves a family's whole model as transformers does, and returns its folder."""

    def folder(family: str, **settings: object) -> Path:
        whole(family).save_pretrained(tmp_path / family, **settings)  # type: ignore[arg-type]
        tiny_tokenizer.save_pretrained(tmp_path / family)
        return tmp_path / family

    return folder


def load(folder: Path, **settings: object) -> Base:
    return Base.load(folder, **{"dtype": "float32", "device": "cpu", **settings})  # type: ignore[arg-type]


def logits(base: Base) -> torch.Tensor:
    with torch.no_grad():
        return base.model(input_ids=IDS).logits


def rewrite(folder: Path, rename: Callable[[str], str | None]) -> None:
    """Rename a checkpoint's tensors; those that become None are dropped."""
    tensors = {new: tensor for key, tensor in load_file(folder / WEIGHTS).items() if (new := rename(key)) is not None}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


@pytest.mark.parametrize("family", FAMILIES | OTHERS)
def test_its_logits_for_text_are_those_of_the_whole_model(
    folder: Callable[..., Path], family: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "loradeck")
    base = load(folder(family))
    theirs = text_logits(whole(family), IDS)
    assert (logits(base) - theirs).norm() <= 1e-5 * theirs.norm()
    lines = [record.getMessage() for record in caplog.records if "text only" in record.getMessage()]
    assert len(lines) == 1
    assert f"is multimodal ({(FAMILIES | OTHERS)[family][0]})" in lines[0]
    assert family in OTHERS or type(base.model).__name__ == SUPPORT[family][1]
    parameters = sum(parameter.numel() for parameter in whole(family).parameters())
    assert sum(parameter.numel() for parameter in base.model.parameters()) < parameters


def test_the_table_of_the_documentation_is_what_is_tested() -> None:
    page = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text().partition("## Multimodal bases")[2]
    rows = [f"| {name} | `{kind}` | yes | {served} | {exported} |" for name, kind, served, exported in SUPPORT.values()]
    table = [line for line in page.splitlines() if "ForCausalLM` |" in line]
    assert table == rows
    assert SUPPORT.keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoints_of_older_and_newer_transformers_are_the_same_model(
    folder: Callable[..., Path], family: str
) -> None:
    """The text lies under `model.`, `language_model.model.` or `model.language_model.`, as each version has it."""
    path = folder(family)
    base = load(path)
    body = next(key for key in load_file(path / WEIGHTS) if key.endswith(".embed_tokens.weight"))
    body = body.removesuffix("embed_tokens.weight")
    for prefix, head in (("model.language_model.", ""), ("language_model.model.", "language_model."), ("model.", "")):

        def moved(key: str, body: str = body, prefix: str = prefix, head: str = head) -> str:
            if key.endswith("lm_head.weight"):
                return f"{head}lm_head.weight"
            return prefix + key.removeprefix(body) if key.startswith(body) and "vis" not in key else key

        rewrite(path, moved)
        again = load(path)
        assert again.fingerprint == base.fingerprint
        assert torch.equal(logits(again), logits(base))
        body = prefix


def test_files_without_text_are_never_opened(folder: Callable[..., Path]) -> None:
    path = folder("gemma3")
    plain = logits(load(path))
    tensors = load_file(path / WEIGHTS)
    (path / WEIGHTS).unlink()
    shards = {"text": {}, "vision": {}, "projector": {}}  # type: dict[str, dict[str, torch.Tensor]]
    for key, tensor in tensors.items():
        name = "text" if key.startswith("language_model.") else "vision" if "vision" in key else "projector"
        shards[name][key] = tensor
    assert all(shards.values())
    for name, each in shards.items():
        save_file(each, path / f"{name}.safetensors", {"format": "pt"})
    index = {key: f"{name}.safetensors" for name, each in shards.items() for key in each}
    (path / INDEX).write_text(json.dumps({"weight_map": index}))
    (path / "vision.safetensors").unlink()
    (path / "projector.safetensors").write_bytes(b"\xff" * 100)
    assert torch.equal(logits(load(path)), plain)
    assert load(path, weights="int8").model is not None
    (path / "text.safetensors").unlink()
    with pytest.raises(BaseModelError, match="has no language model: none of its"):
        load(path)


@pytest.mark.parametrize("family", ["qwen2.5-vl", "gemma3", "mistral3"])
def test_a_quantised_checkpoint_keeps_its_language_models_values(folder: Callable[..., Path], family: str) -> None:
    path = folder(family)
    plain = load(path).model
    tensors = load_file(path / WEIGHTS)
    values = {}
    for key in [key for key in tensors if key.endswith("_proj.weight") and "vis" not in key]:
        scale = tensors[key].abs().amax() / 448
        codes = (tensors[key] / scale).to(torch.float8_e4m3fn)
        values[key.partition("layers.")[2]] = codes.float() * scale
        tensors |= {key: codes, f"{key}_scale_inv": scale}
    save_file(tensors, path / WEIGHTS, {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "modules_to_not_convert": ["visual", "lm_head"]}
    (path / "config.json").write_text(json.dumps(config))
    names = [name for name, _ in plain.named_parameters() if name.partition("layers.")[2] in values]
    assert len(names) == 14
    with torch.no_grad():
        for name in names:
            plain.get_parameter(name).copy_(values[name.partition("layers.")[2]])
        theirs = plain(input_ids=IDS).logits
    assert torch.equal(logits(load(path)), theirs)


def test_an_index_names_files_of_its_folder_only(folder: Callable[..., Path]) -> None:
    path = folder("gemma3")
    (path / WEIGHTS).rename(path.parent / "outside.safetensors")
    (path / "other.safetensors").write_bytes(b"")
    index = dict.fromkeys(load_file(path.parent / "outside.safetensors"), "../outside.safetensors")
    (path / INDEX).write_text(json.dumps({"weight_map": index}))
    with pytest.raises(BaseModelError, match=r"names the file '\.\./outside\.safetensors'"):
        load(path)
    (path / INDEX).write_text("[]")
    with pytest.raises(BaseModelError, match="has no weight_map"):
        load(path)


@pytest.mark.parametrize("family", ["qwen2.5-vl", "gemma3", "llava"])
def test_what_is_missing_is_named(folder: Callable[..., Path], family: str) -> None:
    path = folder(family)
    rewrite(path, lambda key: None if key.endswith("layers.1.mlp.up_proj.weight") else key)
    with pytest.raises(LoradeckError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load(path)
    rewrite(path, lambda key: key if "vis" in key else None)
    with pytest.raises(BaseModelError, match=r"has no language model: none of its .* is an embed_tokens\.weight"):
        load(path)


def test_a_missing_head_is_named_unless_it_is_tied(folder: Callable[..., Path]) -> None:
    path = folder("llava")
    rewrite(path, lambda key: None if "lm_head" in key else key)
    with pytest.raises(BaseModelError, match="lacks weights of its LlamaForCausalLM") as caught:
        load(path)
    assert caught.value.problems == ("lm_head.weight",)
    config = json.loads((path / "config.json").read_text()) | {"tie_word_embeddings": True}
    (path / "config.json").write_text(json.dumps(config))
    model = load(path).model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_two_language_models_are_refused(folder: Callable[..., Path]) -> None:
    path = folder("llava")
    tensors = load_file(path / WEIGHTS)
    twice = {
        key.replace("language_model.", "draft_model."): tensor.clone()
        for key, tensor in tensors.items()
        if key.startswith("language_model.")
    }
    save_file(tensors | twice, path / WEIGHTS, {"format": "pt"})
    with pytest.raises(BaseModelError, match=r"has more than one language model, under 'draft_model\.model\.' and"):
        load(path)
    # A second embedding alone, as that of a speech decoder, is no second language model.
    one = {"decoder.embed_tokens.weight": torch.zeros(3, 3)}
    save_file(tensors | one, path / WEIGHTS, {"format": "pt"})
    assert load(path).model is not None


def test_two_heads_are_refused(folder: Callable[..., Path]) -> None:
    path = folder("llava")
    tensors = load_file(path / WEIGHTS)
    tensors["lm_head.weight"] = tensors["language_model.lm_head.weight"].clone()
    save_file(tensors, path / WEIGHTS, {"format": "pt"})
    with pytest.raises(
        BaseModelError, match=r"has two heads of its language model: language_model\.lm_head and lm_head"
    ):
        load(path)


def test_a_language_model_that_transformers_has_no_class_for_is_refused(folder: Callable[..., Path]) -> None:
    path = folder("qwen3-vl")
    config = json.loads((path / "config.json").read_text())
    config |= {"model_type": "qwen3_vl_moe", "architectures": ["Qwen3VLMoeForConditionalGeneration"]}
    config["text_config"]["model_type"] = "qwen3_vl_moe_text"
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseModelError, match="no causal language model for its qwen3_vl_moe_text"):
        load(path)


@pytest.mark.parametrize("task", ["classify", "tokens", "reward"])
def test_for_tasks_that_transformers_has_no_whole_model_for_the_language_model_is_saved_first(
    folder: Callable[..., Path], tmp_path: Path, task: str
) -> None:
    path = folder("qwen2.5-vl")
    with pytest.raises(BaseModelError) as caught:
        load(path, task=task)
    assert caught.value.message == f"{path} is a qwen2_5_vl; transformers has no such model for the task {task}"
    assert caught.value.hint.startswith("Save its language model and its tokenizer")
    base = load(path)
    base.model.save_pretrained(tmp_path / "text")
    base.tokenizer.save_pretrained(tmp_path / "text")
    assert load(tmp_path / "text", task=task).model.config.model_type == "qwen2"


def test_code_of_its_own_is_never_run(folder: Callable[..., Path]) -> None:
    path = folder("llava")
    config = json.loads((path / "config.json").read_text())
    config |= {"model_type": "internal", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.M"}}
    (path / "config.json").write_text(json.dumps(config))
    (path / "evil.py").write_text("raise SystemExit('run')")
    with pytest.raises(BaseModelError, match="needs its own code, which loradeck never runs"):
        load(path)
