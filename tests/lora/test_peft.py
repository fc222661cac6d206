"""PEFT is the oracle, both ways: the same files, the same outputs; what is not supported is refused by name."""

import copy
import json
import re
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
from huggingface_hub import save_torch_state_dict
from transformers import GPT2Config, GPT2LMHeadModel

from loradeck import Bank, LoraConfig
from loradeck.errors import AdapterError, UnsupportedError
from loradeck.lora.layout import PREFIX

# What PEFT says though all is right: it calls a deprecated property itself, cannot merge these two, and takes the
# bias of B for a matrix that was cut.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1:UserWarning"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*have invalid shape. .*lora_B.bias:UserWarning"),
]

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

# name -> (model, what both configs are given, modules that are adapted)
CASES = {
    "all-linear": ("tiny", {"target_modules": "all-linear"}, 14),
    "attention": ("tiny", {"target_modules": ATTENTION}, 8),
    "regex": ("tiny", {"target_modules": r".*\.1\..*(q|up)_proj"}, 2),
    "excluded": ("tiny", {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.v_proj"]}, 3),
    "one layer": ("tiny", {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]}, 2),
    "embedding": ("tiny", {"target_modules": ["embed_tokens", "q_proj"]}, 3),
    "head": ("tiny", {"target_modules": ["lm_head"]}, 1),
    "rslora": ("tiny", {"target_modules": ATTENTION, "use_rslora": True}, 8),
    "patterns": (
        "tiny",
        {
            "target_modules": "all-linear",
            "rank_pattern": {"(k|v)_proj": 2, "^model.layers.1.self_attn.q_proj": 3, r"layers\.\d.mlp.up_proj": 6},
            "alpha_pattern": {"mlp.+": 3, "q_proj": 20, "self_attn.v_proj": 7},
        },
        14,
    ),
    "rslora patterns": (
        "tiny",
        {
            "target_modules": ["embed_tokens", "up_proj"],
            "rank_pattern": {"embed_tokens": 7, r"layers\.0.*": 2},
            "alpha_pattern": {"embed_tokens": 3.5},
            "use_rslora": True,
        },
        3,
    ),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}, 8),
    "gpt2 positions": ("gpt2", {"target_modules": ["wpe"]}, 1),
    "gpt2 tied embedding": ("gpt2", {"target_modules": ["wte"]}, 1),
    "zoo linear": ("zoo", {"target_modules": ["linear"]}, 1),
    "zoo embedding": ("zoo", {"target_modules": ["embed"]}, 1),
    "zoo convolutions": ("zoo", {"target_modules": ["conv1", "conv2"], "rank_pattern": {"conv2": 3}}, 2),
    "zoo groups": ("zoo", {"target_modules": ["grouped"]}, 1),
    "zoo transposed": ("zoo", {"target_modules": ["mix"], "fan_in_fan_out": True}, 1),
    "zoo most": ("zoo", {"target_modules": ["conv1", "conv2", "embed", "grouped", "linear"], "use_rslora": True}, 5),
}


@pytest.fixture
def gpt2():
    """A tiny GPT-2; its linear layers are Conv1D, with transposed weights, and its head is tied."""
    config = GPT2Config(
        vocab_size=260, n_positions=32, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2, bos_token_id=1,
        eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT2LMHeadModel(config).eval().requires_grad_(False)


# PEFT merges no grouped convolution, and merges into both modules of a tied pair.
UNMERGEABLE = {"gpt2 tied embedding", "zoo groups", "zoo most"}
MERGEABLE = pytest.mark.parametrize("case", [case for case in CASES if case not in UNMERGEABLE], indirect=True)


@pytest.fixture(params=CASES)
def case(request):
    """The base, the arguments of both configs, how many modules are adapted."""
    model, given, count = CASES[request.param]
    return request.getfixturevalue(model), {"r": 4, "lora_alpha": 6, **given}, count


def run(model):
    """Return the model's outputs for fixed inputs."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        if not hasattr(model, "config") or not hasattr(model.config, "vocab_size"):
            return model(torch.randint(0, 11, (5, 6), generator=generator))
        return model(input_ids=torch.randint(3, 260, (4, 7), generator=generator)).logits


def same(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def differs(one, other):
    """Both are numbers, and clearly other ones: an adapter that does nothing would prove nothing."""
    assert one.isfinite().all()
    assert (one - other).abs().max() > 1e-2


def shake(model, dtype=None):
    """Give every tensor of a PEFT adapter random values, whatever PEFT began with."""
    generator = torch.Generator().manual_seed(9)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = (0.2 * torch.randn(parameter.shape, generator=generator)).to(dtype or parameter.dtype)


def theirs(base, config=None, dtype=None, **given):
    """Return a copy of the base with a random PEFT adapter."""
    torch.manual_seed(1)
    config = config or peft.LoraConfig(init_lora_weights=False, **given)
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    shake(model, dtype)
    return model


def lora(**given):
    return peft.LoraConfig(**{"r": 4, "target_modules": ATTENTION, **given})


def saved(model, folder, **options) -> Path:
    model.save_pretrained(folder, **{"save_embedding_layers": False, **options})
    return folder


def read_back(base, folder):
    """Load a folder with PEFT, which must take each tensor and miss none."""
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    result = model.load_adapter(folder, "again")
    assert result.unexpected_keys == []
    assert result.missing_keys == []
    own = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    file = safetensors.torch.load_file(folder / TENSORS)
    assert own.keys() == file.keys()
    assert all(torch.equal(own[key], tensor.to(own[key].dtype)) for key, tensor in file.items())
    return model


def ours(given):
    return LoraConfig(**{key: value for key, value in given.items() if key != "fan_in_fan_out"})


def routed(bank, name):
    with bank.route(name):
        return run(bank.model)


class TestFromUsToPeft:
    """What we write, PEFT reads: every tensor, no warning, the same outputs."""

    def test_equal_outputs(self, case, fill, tmp_path):
        base, given, count = case
        untouched, plain = copy.deepcopy(base), run(base)
        bank = Bank(base)
        adapter = fill(bank.add("mine", ours(given)), size=0.2)
        assert len(adapter.sites) == count
        own = routed(bank, "mine")
        differs(own, plain)
        same(own, run(read_back(untouched, bank.save("mine", tmp_path / "mine"))))

    @MERGEABLE
    def test_merged_weights(self, case, fill, tmp_path):
        base, given, _ = case
        untouched = copy.deepcopy(base)
        bank = Bank(base)
        fill(bank.add("mine", ours(given)), size=0.2)
        folder = bank.save("mine", tmp_path / "mine")
        bank.merge("mine")
        merged = peft.PeftModel.from_pretrained(copy.deepcopy(untouched), folder).merge_and_unload()
        changed = 0
        for path, parameter in merged.named_parameters():
            same(base.get_parameter(path), parameter)
            changed += not torch.equal(parameter, untouched.get_parameter(path))
        assert changed > 0

    def test_our_attention_is_four_projections(self, tiny, fill, tmp_path):
        untouched = copy.deepcopy(tiny)
        bank = Bank(tiny)
        fill(bank.add("mine", LoraConfig(target_modules="attention")))
        model = read_back(untouched, bank.save("mine", tmp_path / "mine"))
        assert {path.split(".")[-1] for path in model.targeted_module_names} == {*ATTENTION}
        same(routed(bank, "mine"), run(model))

    @pytest.mark.parametrize("trainable", [False, True])
    def test_a_second_save_is_the_same_to_the_byte(self, case, fill, tmp_path, trainable):
        base, given, _ = case
        bank = Bank(base)
        fill(bank.add("mine", ours(given)), size=0.2)
        first = bank.save("mine", tmp_path / "first")
        bank.unload("mine")
        bank.load(first, "mine", trainable=trainable)
        second = bank.save("mine", tmp_path / "second")
        for file in (CONFIG, TENSORS):
            assert (second / file).read_bytes() == (first / file).read_bytes()

    def test_names_that_are_parts_of_paths(self, tiny, fill, tmp_path):
        """PEFT drops tensors of other adapters when one is named like a module, and cannot load some names at all."""
        untouched, names = copy.deepcopy(tiny), ["1", "mlp", "lora", "a.b"]
        bank = Bank(tiny)
        for seed, name in enumerate(names):
            fill(bank.add(name, LoraConfig(r=2, target_modules="all-linear")), seed=seed)
        before = {name: routed(bank, name) for name in names}
        folders = [bank.save(name, tmp_path / name) for name in names]
        for name in names:
            bank.unload(name)
        for name, folder in zip(names, folders, strict=True):
            assert bank.load(folder) == name
            assert torch.equal(routed(bank, name), before[name])
            same(before[name], run(read_back(untouched, folder)))
        differs(before["1"], before["mlp"])


class TestFromPeftToUs:
    """What PEFT writes, we read: the same outputs, and the same files when it is saved again."""

    def test_equal_outputs(self, case, tmp_path):
        base, given, count = case
        model = theirs(base, **given)
        folder = saved(model, tmp_path / "theirs")
        plain, expected = run(base), run(model)
        differs(expected, plain)
        bank = Bank(base)
        bank.load(folder)
        bank.load(folder, "trained", trainable=True)
        assert bank.names() == ["theirs", "trained"]
        assert len(bank["theirs"].sites) == count
        for name in bank.names():
            same(routed(bank, name), expected)
        assert torch.equal(run(base), plain)

    @MERGEABLE
    def test_merged_weights(self, case, tmp_path):
        base, given, _ = case
        model = theirs(base, **given)
        bank = Bank(base)
        bank.load(saved(model, tmp_path / "theirs"))
        bank.merge("theirs")
        for path, parameter in model.merge_and_unload().named_parameters():
            same(base.get_parameter(path), parameter)

    @pytest.mark.parametrize("trainable", [False, True])
    def test_saved_again_the_tensors_are_the_same_to_the_byte(self, case, tmp_path, trainable):
        base, given, _ = case
        folder = saved(theirs(base, **given), tmp_path / "theirs")
        bank = Bank(base)
        bank.load(folder, trainable=trainable)
        again = bank.save("theirs", tmp_path / "again")
        assert (again / TENSORS).read_bytes() == (folder / TENSORS).read_bytes()
        # Every key, its order too (the first matching pattern counts); PEFT ends the file without a line break.
        assert (again / CONFIG).read_bytes().strip() == (folder / CONFIG).read_bytes().strip()

    @pytest.mark.parametrize("name", ["mine", "1", "mlp"])
    def test_the_folder_of_a_named_adapter(self, tiny, tmp_path, name):
        model = peft.get_peft_model(
            copy.deepcopy(tiny), peft.LoraConfig(target_modules=["q_proj"]), adapter_name=name
        ).eval()
        shake(model)
        saved(model, tmp_path / "theirs")
        bank = Bank(tiny)
        with pytest.raises(AdapterError, match=CONFIG):
            bank.load(tmp_path / "theirs")
        assert bank.load(tmp_path / "theirs" / name) == name
        same(routed(bank, name), run(model))

    def test_bf16_stays_bf16(self, tiny, tmp_path):
        model = theirs(tiny, target_modules="all-linear", dtype=torch.bfloat16)
        folder = saved(model, tmp_path / "theirs")
        file = safetensors.torch.load_file(folder / TENSORS)
        bank = Bank(tiny)
        bank.load(folder)
        own = dict(bank["theirs"].tensors())
        assert own.keys() == file.keys()
        for key, tensor in own.items():
            assert tensor.dtype == torch.bfloat16
            assert torch.equal(tensor, file[key])
        assert bank["theirs"].nbytes == 2 * sum(tensor.numel() for tensor in file.values())
        again = bank.save("theirs", tmp_path / "again")
        assert (again / TENSORS).read_bytes() == (folder / TENSORS).read_bytes()
        same(routed(bank, "theirs"), run(peft.PeftModel.from_pretrained(copy.deepcopy(tiny), folder).eval()))

    def test_shards(self, tiny, tmp_path):
        model = theirs(tiny, target_modules="all-linear")
        folder = saved(model, tmp_path / "theirs")
        whole = (folder / TENSORS).read_bytes()
        tensors = safetensors.torch.load_file(folder / TENSORS)
        (folder / TENSORS).unlink()
        save_torch_state_dict(
            tensors, folder, filename_pattern="adapter_model{suffix}.safetensors", max_shard_size=len(whole) // 3
        )
        assert len([*folder.glob("adapter_model-*-of-*.safetensors")]) > 2
        bank = Bank(tiny)
        bank.load(folder)
        same(routed(bank, "theirs"), run(model))
        assert (bank.save("theirs", tmp_path / "again") / TENSORS).read_bytes() == whole

    @pytest.mark.parametrize("init", ["gaussian", "orthogonal"])
    def test_other_beginnings_are_plain_lora(self, tiny, tmp_path, init):
        model = theirs(tiny, config=lora(init_lora_weights=init))
        bank, plain = Bank(tiny), run(tiny)
        bank.load(saved(model, tmp_path / "theirs"))
        differs(run(model), plain)
        same(routed(bank, "theirs"), run(model))

    @pytest.mark.filterwarnings("ignore:.*changes the base weights of the model:UserWarning")
    @pytest.mark.parametrize("use_rslora", [False, True])
    @pytest.mark.parametrize("init", ["pissa", "olora"])
    def test_a_converted_one(self, tiny, tmp_path, init, use_rslora):
        """The way out that the refusal names."""
        model = peft.get_peft_model(
            copy.deepcopy(tiny), lora(init_lora_weights=init, use_rslora=use_rslora, target_modules=["q_proj"])
        ).eval()
        config = model.peft_config["default"]
        config.init_lora_weights = True
        saved(model, tmp_path / "initial")
        config.init_lora_weights = init
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_" in name:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
        folder = saved(model, tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
        bank, plain = Bank(tiny), run(tiny)
        bank.load(folder)
        differs(run(model), plain)
        torch.testing.assert_close(routed(bank, "theirs"), run(model), atol=1e-4, rtol=1e-4)  # W - BA + BA is rounded


class TestCopiesOfTheBase:
    """PEFT saves a targeted embedding or head whole, beside its A and B."""

    @pytest.fixture(params=["embed_tokens", "lm_head"])
    def folder(self, request, tiny, tmp_path):
        model = theirs(tiny, target_modules=[request.param, "v_proj"])
        with pytest.warns(UserWarning, match="save_embedding_layers"):
            saved(model, tmp_path / "theirs", save_embedding_layers="auto")
        self.expected = run(model)
        self.tensors = safetensors.torch.load_file(tmp_path / "theirs" / TENSORS)
        self.copies = [key for key in self.tensors if key.endswith("base_layer.weight")]
        assert any(request.param in key for key in self.copies)
        return tmp_path / "theirs"

    def test_an_equal_one_is_accepted(self, tiny, folder, tmp_path):
        untouched = copy.deepcopy(tiny)
        bank = Bank(tiny)
        bank.load(folder)
        same(routed(bank, "theirs"), self.expected)
        again = bank.save("theirs", tmp_path / "again")
        assert safetensors.torch.load_file(again / TENSORS).keys() == self.tensors.keys() - {*self.copies}
        same(run(read_back(untouched, again)), self.expected)

    @pytest.mark.parametrize("change", ["one value", "a row more"])
    def test_a_changed_one_is_refused(self, tiny, folder, change):
        bank, plain, key = Bank(tiny), run(tiny), self.copies[-1]
        self.tensors[key] = (
            torch.cat([self.tensors[key], torch.zeros(1, 64)]) if change == "a row more" else self.tensors[key].clone()
        )
        self.tensors[key][-1, -1] += 0.001
        safetensors.torch.save_file(self.tensors, folder / TENSORS, {"format": "pt"})
        with pytest.raises(AdapterError, match=re.escape(key)):
            bank.load(folder)
        assert bank.names() == []
        assert torch.equal(run(tiny), plain)


REFUSED = {
    "use_dora": lora(use_dora=True),
    "modules_to_save": lora(modules_to_save=["lm_head"]),
    "bias": lora(bias="all"),
    "lora_bias": lora(lora_bias=True),
    "trainable_token_indices": lora(trainable_token_indices={"embed_tokens": [1, 5]}),
    "target_parameters": lora(target_modules=[], target_parameters=["mlp.up_proj.weight"]),
    "init_lora_weights='pissa'": lora(init_lora_weights="pissa"),
    "init_lora_weights='olora'": lora(init_lora_weights="olora"),
    "alora_invocation_tokens": lora(task_type="CAUSAL_LM", alora_invocation_tokens=[4, 5]),
    "peft_type 'IA3'": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "peft_type 'LOHA'": peft.LoHaConfig(target_modules=ATTENTION),
}


class TestRefused:
    """Real adapters of PEFT that compute something else than B A x: refused by name, and nothing happened."""

    @pytest.mark.parametrize("what", REFUSED)
    def test_by_name(self, tiny, tmp_path, what):
        folder = saved(theirs(tiny, config=REFUSED[what]), tmp_path / "theirs")
        bank, plain, modules = Bank(tiny), run(tiny), [path for path, _ in tiny.named_modules()]
        with pytest.raises(UnsupportedError, match=re.escape(what)):
            bank.load(folder)
        assert bank.names() == []
        assert torch.equal(run(tiny), plain)
        assert [path for path, _ in tiny.named_modules()] == modules

    @pytest.mark.parametrize(
        ("key", "default"),
        [("use_dora", False), ("lora_bias", False), ("modules_to_save", None), ("trainable_token_indices", None)],
    )
    def test_a_config_that_hides_it(self, tiny, tmp_path, key, default):
        """The tensors tell it too."""
        folder = saved(theirs(tiny, config=REFUSED[key]), tmp_path / "theirs")
        table = json.loads((folder / CONFIG).read_text())
        assert table[key]
        (folder / CONFIG).write_text(json.dumps({**table, key: default}))
        if key == "modules_to_save":  # its untrained tensors equal the base's
            tensors = safetensors.torch.load_file(folder / TENSORS)
            tensors[PREFIX + "lm_head.weight"] += 0.01
            safetensors.torch.save_file(tensors, folder / TENSORS, {"format": "pt"})
        bank, plain = Bank(tiny), run(tiny)
        with pytest.raises(AdapterError):
            bank.load(folder)
        assert bank.names() == []
        assert torch.equal(run(tiny), plain)
