"""Keys as tools write them: read to PEFT's own outputs where each is known, and refused where one is not."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from loradeck import Adapter, Bank, LoraConfig
from loradeck.errors import AdapterError
from loradeck.lora.manifest import read_folder
from loradeck.lora.spelling import PREFIX, canonical

# PEFT 0.21 asks transformers 5 by a name that is going away.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
IDS = torch.randint(3, 128, (3, 6), generator=torch.Generator().manual_seed(4))
TARGETS = ["q_proj", "down_proj", "embed_tokens"]


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval().requires_grad_(False)


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def peft_model(name: str = "default") -> nn.Module:
    """A PeftModel in memory, of random values."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(llama(), PeftConfig(r=3, target_modules=TARGETS), adapter_name=name).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """The folder that PEFT saves, and its outputs."""
    folder = tmp_path_factory.mktemp("peft") / "poet"
    model = peft_model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder, outputs(model)


@pytest.fixture
def folder(saved: tuple[Path, Tensor], tmp_path: Path) -> Path:
    """A copy of it, to be edited."""
    return shutil.copytree(saved[0], tmp_path / "poet")


def read(folder: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(folder / TENSORS)


def write(folder: Path, tensors: dict[str, Tensor]) -> None:
    safetensors.torch.save_file(
        {key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()},
        folder / TENSORS,
        {"format": "pt"},
    )


def check(folder: Path, wanted: Tensor, model: nn.Module | None = None) -> Bank:
    bank = Bank(model or llama())
    with bank.route(bank.load(folder)):
        assert torch.allclose(outputs(bank.model), wanted, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(wanted, outputs(llama()), atol=1e-2)
    return bank


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def checkpointed(model: nn.Module) -> nn.Module:
    layers = model.base_model.model.model.layers
    for i, layer in enumerate(layers):
        layers[i] = checkpoint_wrapper(layer)
    return model


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "nothing": lambda model: model,
    "torch.compile": compiled,
    "DataParallel": nn.DataParallel,
    "activation checkpoints": checkpointed,
    "all of them": lambda model: nn.DataParallel(compiled(checkpointed(model))),
}


class TestTools:
    @pytest.mark.parametrize("tool", WRAPPERS)
    @pytest.mark.parametrize("name", ["default", "weight", "lora_A", "my-own"])
    def test_the_state_of_a_wrapped_model_in_memory(self, tool, name, saved, folder):
        """As scripts save it: whatever has lora_ in its key, with the adapter's name in it."""
        state = WRAPPERS[tool](peft_model(name)).state_dict()
        tensors = {key: tensor for key, tensor in state.items() if ".lora_" in key}
        assert not tensors.keys() & read(folder).keys()
        write(folder, tensors)
        check(folder, saved[1])

    @pytest.mark.parametrize(
        "respell",
        [
            lambda key: key.removeprefix(PREFIX), lambda key: PREFIX + key, lambda key: PREFIX * 3 + key,
            lambda key: "module." + key, lambda key: "module." + key.removeprefix(PREFIX),
            lambda key: key.replace(PREFIX, PREFIX + "module."), lambda key: "_orig_mod.module." + PREFIX + key,
            lambda key: key.replace(PREFIX, PREFIX + "_orig_mod."), lambda key: "_fsdp_wrapped_module." + key,
            lambda key: key.replace(".layers.1.", ".layers.1._fsdp_wrapped_module._checkpoint_wrapped_module."),
            lambda key: key.replace("q_proj.", "q_proj._orig_mod."), lambda key: "module.module." + key,
            lambda key: key.replace(".lora_A.weight", ".lora_A.x.weight").replace("_B.weight", "_B.x.weight"),
        ],
    )  # fmt: skip
    def test_every_key_in_another_spelling(self, respell, saved, folder, tmp_path):
        """Also of the copies that PEFT saves; saved again it is PEFT's spelling."""
        tensors = read(folder)
        assert any("base_layer" in key for key in tensors)
        write(folder, {respell(key): tensor for key, tensor in tensors.items()})
        bank = check(folder, saved[1])
        again = read(bank.save("poet", tmp_path / "again"))
        assert again.keys() == {key for key in tensors if "lora_" in key}
        assert all(torch.equal(again[key], tensors[key]) for key in again)
        assert set(read_folder(folder).spellings.values()) <= set(read(folder))

    def test_targets_in_that_spelling_too(self, saved, folder):
        tensors = read(folder)
        write(folder, {key.replace(PREFIX, PREFIX + "_orig_mod."): tensor for key, tensor in tensors.items()})
        paths = {key.partition(".lora_")[0].removeprefix(PREFIX) for key in tensors if "lora_" in key}
        table = json.loads((folder / CONFIG).read_text())
        table["target_modules"] = [f"_orig_mod.{path}" for path in sorted(paths)]
        (folder / CONFIG).write_text(json.dumps(table))
        bank = check(folder, saved[1])
        again = json.loads((bank.save("poet", folder.with_name("again")) / CONFIG).read_text())
        assert again == {**table, "target_modules": sorted(paths)}

    def test_shards(self, saved, folder):
        tensors = {"module." + key: tensor for key, tensor in read(folder).items()}
        halves = [dict(list(tensors.items())[i::2]) for i in range(2)]
        (folder / TENSORS).unlink()
        names = [f"adapter_model-{i}.safetensors" for i in range(2)]
        for name, half in zip(names, halves, strict=True):
            safetensors.torch.save_file(half, folder / name, {"format": "pt"})
        weight_map = {key: name for name, half in zip(names, halves, strict=True) for key in half}
        (folder / f"{TENSORS}.index.json").write_text(json.dumps({"weight_map": weight_map}))
        check(folder, saved[1])
        safetensors.torch.save_file(
            {key.removeprefix("module."): tensor for key, tensor in halves[0].items()}, folder / names[1]
        )
        with pytest.raises(AdapterError, match="another shard"):
            Bank(llama()).load(folder)


class Wrapped(nn.Module):
    """A base with a child of the name that DistributedDataParallel uses, and a twin beside it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Linear(4, 4))
        self.append = nn.Sequential(nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.append(self.module(x))


class TestBases:
    """A base that is wrapped itself, or has such names: its own paths come first."""

    @pytest.mark.parametrize("target", ["module.0", "append.0"])
    def test_a_module_called_module(self, target, fill, tmp_path):
        bank = Bank(Wrapped().eval().requires_grad_(False))
        fill(bank.add("poet", LoraConfig(r=2, target_modules=[target])))
        bank.save("poet", tmp_path / "poet")
        bank.unload("poet")
        bank.load(tmp_path / "poet")
        assert [*bank["poet"].sites] == [target]

    def test_a_compiled_base(self, saved, folder, fill, tmp_path):
        bank = Bank(compiled(llama()))
        fill(bank.add("own", LoraConfig(r=2, target_modules=["q_proj"])))
        bank.save("own", tmp_path / "own")
        bank.unload("own")
        bank.load(tmp_path / "own")
        assert all(path.startswith("_orig_mod.model.layers.") for path in bank["own"].sites)
        check(tmp_path / "own", self.logits(bank))

    def logits(self, bank: Bank) -> Tensor:
        with bank.route("own"):
            return outputs(bank.model._orig_mod)


class TestRefused:
    """No key is left over in silence."""

    @pytest.mark.parametrize(
        "other",
        ["module.", "_orig_mod.", PREFIX],
    )
    def test_two_keys_of_one_tensor(self, other, folder):
        tensors = read(folder)
        key = next(key for key in tensors if key.endswith("lora_A.weight"))
        write(folder, {**tensors, other + key: tensors[key]})
        with pytest.raises(AdapterError) as caught:
            Bank(llama()).load(folder)
        assert f"'{other + key}'" in str(caught.value)
        assert f"'{key}'" in str(caught.value)

    @pytest.mark.parametrize(
        "respell",
        [
            lambda key: key.replace("base_model", "Base_model"), lambda key: "model." + key, lambda key: "x." + key,
            lambda key: key.replace("base_model.model.", "base_model."), lambda key: key.replace("lora_A", "lora_a"),
            lambda key: key.replace("lora_A", "lora.A"), lambda key: key.replace("lora_A", "loraA"),
            lambda key: key.replace("lora_A", "lora_down"), lambda key: key.replace(".weight", ""),
            lambda key: key.replace(".weight", ".weights"), lambda key: key.replace("self_attn", "attention"),
            lambda key: key.replace("model.layers", "layers"), lambda key: key.replace("layers", "layer"),
            lambda key: key.replace("layers.0", "layers.00"), lambda key: key.replace(".", "/"),
            lambda key: key.replace("q_proj", "module.q_proj"), lambda key: key.replace("q_proj", "orig_mod.q_proj"),
            lambda key: key.replace("lora_A.weight", "lora_A.a.b.weight"), lambda key: key + ".default",
            lambda key: key.replace("lora_A.weight", "lora_A.default.default.weight"),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("which", ["one", "all"])
    def test_a_key_that_no_rule_brings_home(self, respell, which, folder):
        tensors = read(folder)
        first = next(key for key in tensors if key.endswith("layers.0.self_attn.q_proj.lora_A.weight"))
        new = {respell(key) if which == "all" or key == first else key: tensor for key, tensor in tensors.items()}
        assert new.keys() != tensors.keys()
        write(folder, new)
        bank = Bank(llama())
        with pytest.raises(AdapterError):
            bank.load(folder)
        assert bank.names() == []

    @pytest.mark.parametrize(
        ("old", "new", "hint"),
        [
            ("model.layers", "layers", "The base has model.layers.0"),
            ("model.layers", "transformer.model.layers", "The base has model.layers.0"),
            ("layers.1", "layers.7", "Load the base it was trained on"),
            ("self_attn.q_proj", "attn.c_attn", "Load the base it was trained on"),
        ],
    )
    def test_the_hint_is_right_and_the_key_the_files(self, old, new, hint, folder):
        """A module under another path is the spelling's fault, one that is nowhere the base's."""
        tensors = {key.replace(old, new): tensor for key, tensor in read(folder).items() if "down_proj" not in key}
        write(folder, {f"module.{key}": tensor for key, tensor in tensors.items()})
        table = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**table, "target_modules": [*TARGETS, "c_attn"]}))
        key = next(key for key in tensors if new in key and "lora_A" in key)
        with pytest.raises(AdapterError, match=r"is not a module of this base") as caught:
            Bank(llama()).load(folder)
        assert f"module.{key}" in str(caught.value)
        assert caught.value.hint.startswith(hint)

    def test_what_is_wrong_with_a_tensor_is_said_of_the_files_key(self, folder):
        tensors = {f"module.{key}": tensor for key, tensor in read(folder).items()}
        key = next(key for key in tensors if key.endswith("q_proj.lora_B.weight"))
        tensors[key][0, 0] = torch.nan
        write(folder, tensors)
        with pytest.raises(AdapterError, match=f"{key} holds NaN"):
            Bank(llama()).load(folder)


class TestCanonical:
    WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
    FRONT = st.lists(st.sampled_from(["module", "base_model", "model", "layers", "0", "", *WRAPPERS]), max_size=7)
    END = st.sampled_from([
        "lora_A.weight", "lora_B.weight", "lora_A.x.weight", "lora_B.module.bias", "lora_embedding_A", "weight", "bias",
        "lora_embedding_B.default", "base_layer.weight", "lora_magnitude_vector", "lora_C.weight", "", "module",
    ])  # fmt: skip

    @settings(max_examples=300, database=None, derandomize=True)
    @given(FRONT, st.lists(st.sampled_from(WRAPPERS), max_size=2), END)
    def test_it_is_its_own_canonical_spelling(self, front, inner, end):
        key = canonical(".".join([*front, "q_proj", *inner, end]))
        assert key.startswith(PREFIX)
        assert canonical(key) == key

    def test_keys_that_are_long_take_no_longer(self):
        for part in ("module.", "_orig_mod.", "lora_A.", PREFIX, "lora_", ".", "a"):
            canonical(part * 200_000)

    def test_a_canonical_file_is_read_as_it_is(self, saved):
        files = read_folder(saved[0])
        assert files.spellings == {}
        assert files.headers[0].entries is read_folder(saved[0]).headers[0].entries


class Experts(nn.Module):
    """A mixture as transformers 4 has it: a linear router, and experts of linear layers. (batch, 8) -> (batch, 8)"""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(8, 3, bias=False)
        self.experts = nn.ModuleList(nn.ModuleDict({"up_proj": nn.Linear(8, 8)}) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        return sum(weights[:, i : i + 1] * expert["up_proj"](x) for i, expert in enumerate(self.experts))


class TestMixtures:
    @pytest.fixture
    def moe(self, tmp_path: Path) -> tuple[Path, Tensor]:
        model = get_peft_model(
            nn.ModuleDict({"mlp": Experts()}).eval(), PeftConfig(r=2, target_modules=["gate", "up_proj"])
        )
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_" in key:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(tmp_path / "moe")
        with torch.no_grad():
            return tmp_path / "moe", model.base_model.model["mlp"](torch.ones(2, 8))

    def test_linear_experts_and_a_linear_router(self, moe):
        bank = Bank(nn.ModuleDict({"mlp": Experts()}).eval().requires_grad_(False))
        with bank.route(bank.load(moe[0])):
            assert torch.allclose(bank.model["mlp"](torch.ones(2, 8)), moe[1], atol=1e-5)

    def test_experts_in_one_parameter_and_a_router_that_is_no_linear(self, moe):
        """As transformers 5 has them: what is missing is named."""
        config = MixtralConfig(
            vocab_size=128, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, num_local_experts=3,
        )  # fmt: skip
        bank = Bank(MixtralForCausalLM(config))
        path = next(path for path, _ in bank.model.named_modules() if path.endswith(".experts"))
        tensors = read(moe[0])
        for part, hint in (("experts", "has the weights of all experts in one parameter here"), ("gate", "Train it")):
            prefix = PREFIX + path.removesuffix(".experts") + "."
            write(moe[0], {key.replace(f"{PREFIX}mlp.", prefix): t for key, t in tensors.items() if part in key})
            with pytest.raises(AdapterError) as caught:
                bank.load(moe[0])
            assert hint in caught.value.hint
            assert path.removesuffix("experts") + part in str(caught.value)


def test_a_folder_without_a_base_is_read_the_same_way(folder: Path) -> None:
    """By the verbs that have no base at hand."""
    wanted = {path: site.r for path, site in read_folder(folder).sites.items()}
    tensors = read(folder)
    write(folder, {f"_orig_mod.{key}": tensor for key, tensor in tensors.items() if "lora_" in key})
    assert {path: site.r for path, site in read_folder(folder).sites.items()} == wanted
    assert {key for key, _ in Adapter.load(folder).tensors()} == {key for key in tensors if "lora_" in key}
