"""Adapters of multimodal models: PEFT on the whole model is the oracle, of what it writes and of what it reads."""

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import safetensors.torch
import torch
from peft import PeftModel
from tests.multimodal import FAMILIES, VOCABULARY, adapted, text_logits, whole
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from loradeck import Adapter, Bank, Base, LoraConfig
from loradeck.errors import AdapterError

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning"),
]
IDS = torch.randint(3, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(1))
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SPELLINGS = ("model.language_model.", "language_model.model.", "model.")


@pytest.fixture
def load(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[[str], Base]:
    """Return a function that saves a family's whole model, and loads it here."""

    def load(family: str) -> Base:
        folder = tmp_path / f"{family}-base"
        whole(family).save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        return Base.load(folder, dtype="float32", device="cpu")

    return load


def trained(family: str, folder: Path, seed: int = 0, **settings: object) -> Tensor:
    """Save an adapter that PEFT made on the whole model; return PEFT's logits."""
    return text_logits(adapted(family, folder, seed, **settings), IDS)


def peft_logits(family: str, folder: Path) -> Tensor:
    """PEFT's logits of the whole model with an adapter from a folder, every tensor of which it must find."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected|not found).*")
        model = PeftModel.from_pretrained(whole(family), str(folder))
    paths = {name for name, module in model.named_modules() if hasattr(module, "lora_A") and module.lora_A}
    tensors = safetensors.torch.load_file(folder / TENSORS)
    assert len(paths) == len([key for key in tensors if key.endswith("lora_A.weight")])
    return text_logits(model.eval(), IDS)


def routed(base: Base, bank: Bank, rows: object) -> Tensor:
    with torch.no_grad(), bank.route(rows):  # type: ignore[arg-type]
        return base.model(input_ids=IDS).logits


def respell(folder: Path, new: Path, rename: Callable[[str], str]) -> Path:
    """Copy an adapter's folder with other paths of modules; its targets name the modules' last parts."""
    new.mkdir()
    tensors = safetensors.torch.load_file(folder / TENSORS)
    keys = {key: "base_model.model." + rename(key.removeprefix("base_model.model.")) for key in tensors}
    safetensors.torch.save_file({keys[key]: tensor for key, tensor in tensors.items()}, new / TENSORS)
    config = json.loads((folder / CONFIG).read_text())
    config["target_modules"] = sorted({key.split(".lora_")[0].rpartition(".")[2] for key in tensors})
    (new / CONFIG).write_text(json.dumps(config))
    return new


def prefix_of(folder: Path) -> str:
    key = next(iter(safetensors.torch.load_file(folder / TENSORS)))
    return key.removeprefix("base_model.model.").partition("layers.")[0]


def equal(one: Tensor, two: Tensor) -> bool:
    return bool((one - two).norm() <= 1e-5 * two.norm())


@pytest.mark.parametrize("family", FAMILIES)
class TestFamilies:
    def test_adapters_of_the_whole_model_load_alone_and_in_one_batch(
        self, load: Callable[[str], Base], tmp_path: Path, family: str
    ) -> None:
        first = trained(family, tmp_path / "first", 1)
        second = trained(family, tmp_path / "second", 2, r=2, rank_pattern={"q_proj": 8}, use_rslora=True)
        base = load(family)
        bank = Bank(base.model)
        plain = text_logits(whole(family), IDS)
        bank.load(tmp_path / "first")
        assert equal(routed(base, bank, "first"), first)
        bank.load(tmp_path / "second")
        rows = routed(base, bank, ["first", None, "second"])
        for row, logits in zip(rows, (first[0], plain[1], second[2]), strict=True):
            assert equal(row, logits)
        assert not equal(first, plain)
        assert not equal(second, first)

    def test_what_is_saved_here_is_read_by_peft_on_the_whole_model(
        self, load: Callable[[str], Base], tmp_path: Path, family: str
    ) -> None:
        base = load(family)
        bank = Bank(base.model)
        adapter = bank.add("poet", LoraConfig(r=4, rank_pattern={"layers.1.mlp.down_proj": 2}))
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        logits = routed(base, bank, "poet")
        bank.save("poet", tmp_path / "poet")
        inner = "language_model.model." if family == "llama4" else "model.language_model."
        assert all(
            key.startswith(f"base_model.model.{inner}")
            for key in safetensors.torch.load_file(tmp_path / "poet" / TENSORS)
        )
        assert equal(peft_logits(family, tmp_path / "poet"), logits)
        bank.load(tmp_path / "poet", "again")
        assert torch.equal(routed(base, bank, "again"), logits)
        bank.save("again", tmp_path / "again")
        for name in (TENSORS, CONFIG):
            assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "poet" / name).read_bytes()

    def test_every_spelling_of_the_keys_is_the_same_adapter(
        self, load: Callable[[str], Base], tmp_path: Path, family: str
    ) -> None:
        logits = trained(family, tmp_path / "first")
        base = load(family)
        bank = Bank(base.model)
        own = prefix_of(tmp_path / "first")
        for number, prefix in enumerate(SPELLINGS):
            folder = respell(
                tmp_path / "first",
                tmp_path / f"s{number}",
                lambda path, prefix=prefix: prefix + path.removeprefix(own),
            )
            bank.load(folder)
            assert equal(routed(base, bank, f"s{number}"), logits)
            # Saved again it is what it was, as its own targets need it.
            bank.save(f"s{number}", tmp_path / f"saved{number}")
            assert prefix_of(tmp_path / f"saved{number}") == prefix
            saved, own_tensors = (
                safetensors.torch.load_file(each / TENSORS) for each in (tmp_path / f"saved{number}", folder)
            )
            assert saved.keys() == own_tensors.keys()
            assert all(torch.equal(saved[key], own_tensors[key]) for key in saved)


@pytest.mark.parametrize("family", ["gemma3", "qwen3.5", "llama4"])
def test_an_adapter_of_the_whole_model_loads_on_a_checkpoint_of_its_language_model(
    load: Callable[[str], Base], tmp_path: Path, family: str
) -> None:
    logits = trained(family, tmp_path / "first")
    base = load(family)
    base.model.save_pretrained(tmp_path / "text")
    base.tokenizer.save_pretrained(tmp_path / "text")
    text = Base.load(tmp_path / "text", dtype="float32", device="cpu")
    assert not hasattr(text.model, "whole_paths")
    bank = Bank(text.model)
    bank.load(tmp_path / "first")
    assert equal(routed(text, bank, "first"), logits)


class Spelled(nn.Module):
    """Linear layers at the paths given, all of one shape."""

    def __init__(self, *paths: str, size: int = 6) -> None:
        super().__init__()
        for path in paths:
            parent: nn.Module = self
            *parents, name = path.split(".")
            for each in parents:
                if each not in parent._modules:
                    parent.add_module(each, nn.Module())
                parent = parent.get_submodule(each)
            parent.add_module(name, nn.Linear(size, size, bias=False))


def made(folder: Path, *paths: str, size: int = 6) -> Path:
    pairs = {path: (torch.randn(2, size), torch.randn(size, 2)) for path in paths}
    return Adapter.of(LoraConfig(r=2), pairs).save(folder)


LAYERS = [f"layers.{layer}.{name}" for layer in range(2) for name in ("q_proj", "up_proj")]


def under(prefix: str) -> list[str]:
    return [prefix + layer for layer in LAYERS]


class TestSpellings:
    """On any model: by its modules and all shapes."""

    @pytest.mark.parametrize("here", SPELLINGS)
    @pytest.mark.parametrize("there", SPELLINGS)
    def test_each_loads_on_each(self, tmp_path: Path, here: str, there: str) -> None:
        ours = "language_model.lm_head" if here.startswith("language") else "lm_head"
        theirs = "language_model.lm_head" if there.startswith("language") else "lm_head"
        bank = Bank(Spelled(*under(here), ours))
        bank.load(made(tmp_path / "poet", *under(there), theirs))
        assert sorted(bank["poet"].sites) == sorted([*under(here), ours])
        source = Adapter.load(tmp_path / "poet")
        for mine, own in zip([*under(here), ours], [*under(there), theirs], strict=True):
            assert all(map(torch.equal, bank["poet"].pair(mine), source.pair(own)))

    def test_a_part_that_does_not_fit_is_refused_and_named(self, tmp_path: Path) -> None:
        bank = Bank(Spelled(*under("model.")))
        folder = made(tmp_path / "poet", *under("model.language_model."), "model.language_model.layers.2.q_proj")
        with pytest.raises(AdapterError) as caught:
            bank.load(folder)
        written = "base_model.model.model.language_model.layers.2.q_proj.lora_A.weight"
        assert caught.value.problems == (f"model.layers.2.q_proj ({written} in the file) is not a module of this base",)
        assert bank.names() == []

    def test_other_shapes_are_refused(self, tmp_path: Path) -> None:
        bank = Bank(Spelled(*under("model.")))
        with pytest.raises(AdapterError, match=r"model\.layers\.0\.q_proj needs A \(2, 6\)"):
            bank.load(made(tmp_path / "poet", *under("model.language_model."), size=8))

    def test_two_ways_that_fit_are_refused(self, tmp_path: Path) -> None:
        both = [*under("model.language_model."), *under("language_model.model.")]
        with pytest.raises(AdapterError, match=r"model\.layers\.0\.q_proj is not a module of this base"):
            Bank(Spelled(*both)).load(made(tmp_path / "poet", *under("model.")))

    def test_two_spellings_of_one_module_in_a_file_are_refused(self, tmp_path: Path) -> None:
        bank = Bank(Spelled(*under("model.")))
        folder = made(tmp_path / "poet", *under("model."), *under("model.language_model."))
        with pytest.raises(AdapterError) as caught:
            bank.load(folder)
        assert len(caught.value.problems) == len(LAYERS)
        assert all("model.language_model.layers" in problem for problem in caught.value.problems)

    def test_a_model_that_has_the_modules_as_they_are_keeps_them(self, tmp_path: Path) -> None:
        both = [*under("model.language_model."), *under("model.")]
        bank = Bank(Spelled(*both))
        bank.load(made(tmp_path / "poet", *under("model.")))
        assert sorted(bank["poet"].sites) == sorted(under("model."))

    @pytest.mark.parametrize("prefix", ["language_model.", "model.text_model.", "transformer.", "model.model."])
    def test_other_prefixes_are_no_spelling(self, tmp_path: Path, prefix: str) -> None:
        with pytest.raises(AdapterError, match="is not a module of this base"):
            Bank(Spelled(*under("model."))).load(made(tmp_path / "poet", *under(prefix)))


def test_modules_of_vision_are_refused_by_name(load: Callable[[str], Base], tmp_path: Path) -> None:
    trained("gemma3", tmp_path / "both", target_modules=["q_proj"])
    bank = Bank(load("gemma3").model)
    with pytest.raises(AdapterError) as caught:
        bank.load(tmp_path / "both")
    path = "model.vision_tower.encoder.layers.0.self_attn.q_proj"
    reason = "belongs to model.vision_tower, which is left out: this base is a language model alone, for text"
    assert caught.value.problems == (f"{path} {reason}",)
    assert bank.names() == []


def test_all_linear_is_the_language_model_and_its_targets_match_no_module_of_vision(
    load: Callable[[str], Base], tmp_path: Path
) -> None:
    base = load("qwen2.5-vl")  # its vision has a gate_proj too
    bank = Bank(base.model)
    bank.add("poet", LoraConfig(r=2))
    assert len(bank["poet"].sites) == 14
    bank.save("poet", tmp_path / "poet")
    model = PeftModel.from_pretrained(whole("qwen2.5-vl"), str(tmp_path / "poet"))
    paths = [name for name, module in model.named_modules() if hasattr(module, "lora_A") and module.lora_A]
    assert len(paths) == 14
    assert all(".language_model.layers." in name for name in paths)


@pytest.mark.parametrize("family", ["gemma3", "llava", "llama4"])
def test_the_head_is_respelled_too(load: Callable[[str], Base], tmp_path: Path, family: str) -> None:
    targets = r".*(language_model.*q_proj|lm_head)"
    logits = trained(family, tmp_path / "first", target_modules=targets)
    base = load(family)
    bank = Bank(base.model)
    bank.load(tmp_path / "first")
    assert equal(routed(base, bank, "first"), logits)
    old = {"model.language_model.": "language_model.model.", "lm_head": "language_model.lm_head"}

    def older(path: str, old: Mapping[str, str] = old) -> str:
        return next((new + path.removeprefix(key) for key, new in old.items() if path.startswith(key)), path)

    bank.load(respell(tmp_path / "first", tmp_path / "old", older))
    assert equal(routed(base, bank, "old"), logits)


def test_a_combination_is_written_as_the_whole_model_spells_it(load: Callable[[str], Base], tmp_path: Path) -> None:
    trained("gemma3", tmp_path / "first", 1)
    trained("gemma3", tmp_path / "second", 2)
    base = load("gemma3")
    bank = Bank(base.model)
    bank.load(tmp_path / "first")
    bank.load(tmp_path / "second")
    bank.combine({"first": 0.5, "second": 0.5}, name="both")
    bank.save("both", tmp_path / "both")
    assert equal(peft_logits("gemma3", tmp_path / "both"), routed(base, bank, "both"))
