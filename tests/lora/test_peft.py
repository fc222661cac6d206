"""PEFT is the oracle, both ways: what it writes we read to equal outputs or refuse by name, and it reads what we write."""

import copy
import json
import warnings

import pytest
import safetensors.torch
import torch
from huggingface_hub import save_torch_state_dict
from peft import IA3Config, LoHaConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft import LoraConfig as PeftConfig
from tests.digest import digest
from torch import nn
from transformers import (
    BitsAndBytesConfig,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from loradeck import Bank, LoraConfig
from loradeck.base.weights import prepare
from loradeck.errors import AdapterError, RouteError, UnsupportedError

# PEFT 0.21 asks transformers 5 by a name that is going away.
# The other two it says of any adapter on such layers, its own as well.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning"),
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1:UserWarning"),
]
TENSORS = "adapter_model.safetensors"
IDS = torch.randint(3, 128, (3, 6), generator=torch.Generator().manual_seed(4))


def llama(**settings):
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, **settings,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=2, initializer_range=0.2))


def gemma():
    config = Gemma3TextConfig(
        vocab_size=128, hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, initializer_range=0.2,
    )  # fmt: skip
    return Gemma3ForCausalLM(config)


class Convs(nn.Module):
    """Convolutions and an embedding with a padding index: ids (batch, 6) -> (batch, 6, 3, 3)."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(128, 12, padding_idx=5)
        self.conv1 = nn.Conv1d(12, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(1, 4, (3, 2), stride=2)
        self.grouped = nn.Conv2d(4, 6, 1, groups=2)

    def forward(self, ids):
        return self.grouped(self.conv2(self.conv1(self.embed(ids).transpose(1, 2)).relu()[:, None]).relu())


FACTORIES = {"llama": llama, "gpt2": gpt2, "gemma": gemma, "convs": Convs}
CASES = {
    "linear": ("llama", {"r": 4, "target_modules": ["q_proj", "v_proj"]}),
    "all linear": ("llama", {"r": 8, "lora_alpha": 3, "target_modules": "all-linear"}),
    "rank-stabilised": ("llama", {"r": 5, "lora_alpha": 7, "use_rslora": True, "target_modules": ["up_proj"]}),
    "a regex": ("llama", {"r": 2, "target_modules": r".*\.layers\.1\.(self_attn|mlp)\.(q|up)_proj"}),
    "some layers": ("llama", {"r": 2, "target_modules": ["k_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    "excluded": ("llama", {"r": 2, "target_modules": ["k_proj", "o_proj"], "exclude_modules": ["0.self_attn.o_proj"]}),
    "patterns": (
        "llama",
        {
            "r": 4,
            "lora_alpha": 9,
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7, r"^model\.layers\.0\.self_attn\.v_proj": 1},
            "alpha_pattern": {"k_proj": 3, r"layers\.1\.mlp.*": 30, "model.layers.0.mlp.down_proj": 1},
        },
    ),
    "patterns, rank-stabilised": (
        "llama",
        {"r": 4, "use_rslora": True, "target_modules": ["q_proj", "o_proj"], "rank_pattern": {"q_proj": 9}, "alpha_pattern": {"o_proj": 2}},
    ),
    "embedding and head": ("llama", {"r": 3, "target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "scaled embedding": ("gemma", {"r": 3, "target_modules": ["embed_tokens", "q_proj"]}),
    "gpt2": ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "gpt2, every linear": ("gpt2", {"r": 4, "target_modules": "all-linear", "fan_in_fan_out": True}),
    "gpt2, positions": ("gpt2", {"r": 3, "target_modules": ["wpe"]}),
    "gpt2, tied embedding": ("gpt2", {"r": 3, "target_modules": ["wte"]}),
    "convolutions": ("convs", {"r": 4, "target_modules": ["embed", "conv1", "conv2"]}),
    "a grouped convolution": ("convs", {"r": 4, "target_modules": ["grouped", "conv1"]}),
}  # fmt: skip


COPIED = ("embedding and head", "scaled embedding", "gpt2, tied embedding", "gpt2, positions")  # with base weights
# PEFT merges no grouped convolution, and an embedding into its tied head too.
MERGEABLE = sorted(CASES.keys() - {"a grouped convolution", "scaled embedding", "gpt2, tied embedding"})


def made(factory, seed=0):
    """The same frozen base at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return factory().eval().requires_grad_(False)


def outputs(model):
    with torch.no_grad():
        y = model(IDS)
    return y if isinstance(y, torch.Tensor) else y.logits


def write_with_peft(model, folder, config, name="default", **options):
    """Let PEFT make an adapter of random values and save it; return the model's outputs with it, and its folder."""
    torch.manual_seed(1)
    with warnings.catch_warnings():  # what PEFT says of its own doings is not our matter here
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, config, adapter_name=name, **options).eval()
        with torch.no_grad():
            for key, parameter in adapted.named_parameters():
                if parameter.requires_grad or "lora_" in key:
                    parameter.copy_(torch.randn(parameter.shape) * 0.2)
        wanted = outputs(adapted)
        adapted.save_pretrained(folder)
    return wanted, folder if name == "default" else folder / name


class TestTheirsToOurs:
    """PEFT writes, we read."""

    @pytest.mark.slow
    @pytest.mark.parametrize("case", CASES)
    def test_equal_outputs(self, case, tmp_path):
        factory, settings = CASES[case]
        config = PeftConfig(**settings)
        wanted, folder = write_with_peft(made(FACTORIES[factory]), tmp_path / "theirs", config)
        model = made(FACTORIES[factory])
        base = outputs(model)
        bank = Bank(model)
        assert bank.load(folder) == "theirs"
        with bank.route("theirs"):
            assert torch.allclose(outputs(model), wanted, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(wanted, base, atol=1e-2)
        if case == "gpt2, positions":  # one row of positions serves the whole batch, so rows cannot differ there
            with bank.route(["theirs", None, "theirs"]), pytest.raises(RouteError, match="wpe got 1 rows"):
                outputs(model)
            return
        with bank.route(["theirs", None, "theirs"]):
            mixed = outputs(model)
        assert torch.allclose(mixed[[0, 2]], wanted[[0, 2]], atol=1e-5, rtol=1e-5)
        assert torch.equal(mixed[1], base[1])

    @pytest.mark.slow
    @pytest.mark.parametrize("case", MERGEABLE)
    def test_equal_merged_weights(self, case, tmp_path):
        factory, settings = CASES[case]
        config = PeftConfig(**settings)
        _, folder = write_with_peft(made(FACTORIES[factory]), tmp_path / "theirs", config)
        bank = Bank(made(FACTORIES[factory]))
        bank.load(folder)
        bank.merge("theirs")
        ours = bank.model.state_dict()
        base = made(FACTORIES[factory]).state_dict()
        theirs = PeftModel.from_pretrained(made(FACTORIES[factory]), folder).merge_and_unload().state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.allclose(ours[key], tensor, atol=1e-5) for key, tensor in theirs.items())
        changed = [key for key, tensor in ours.items() if not torch.equal(tensor, base[key])]
        assert len(changed) == len(bank["theirs"].sites)

    @pytest.mark.slow
    @pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
    @pytest.mark.parametrize("case", CASES)
    def test_saving_again_gives_their_bytes(self, case, trainable, tmp_path):
        factory, settings = CASES[case]
        _, folder = write_with_peft(made(FACTORIES[factory]), tmp_path / "theirs", PeftConfig(**settings))
        bank = Bank(made(FACTORIES[factory]))
        bank.load(folder, trainable=trainable)
        again = bank.save("theirs", tmp_path / "again")
        tensors = safetensors.torch.load_file(folder / TENSORS)
        copies = [key for key in tensors if "lora_" not in key]
        if copies:  # of weights of the base; they are not written again
            assert case in COPIED
            kept = safetensors.torch.load_file(again / TENSORS)
            assert kept.keys() == tensors.keys() - set(copies)
            assert all(torch.equal(kept[key], tensors[key]) for key in kept)
        else:
            assert (again / TENSORS).read_bytes() == (folder / TENSORS).read_bytes()
        # Every key in its order, for the first pattern that matches counts; PEFT ends the file without a line break.
        theirs, ours = ((path / "adapter_config.json").read_bytes() for path in (folder, again))
        assert ours == theirs

    @pytest.mark.parametrize("name", ["1", "mlp", "layers", "weight", "q_proj", "self_attn", "default2"])
    def test_their_adapters_names(self, name, tmp_path):
        """The name is no part of the file's keys."""
        config = PeftConfig(r=3, target_modules=["q_proj", "up_proj"])
        wanted, folder = write_with_peft(made(llama), tmp_path, config, name)
        bank = Bank(made(llama))
        with pytest.raises(AdapterError, match=r"holds no adapter_config\.json"):
            bank.load(tmp_path)
        assert bank.load(folder) == name
        with bank.route(name):
            assert torch.allclose(outputs(bank.model), wanted, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_half_precision_stays_half(self, dtype, tmp_path):
        config = PeftConfig(r=4, target_modules="all-linear")
        wanted, folder = write_with_peft(made(llama).to(dtype), tmp_path / "a", config, autocast_adapter_dtype=False)
        model = made(llama).to(dtype)
        bank = Bank(model)
        bank.load(folder)
        assert {t.dtype for _, t in bank["a"].tensors()} == {dtype}
        with bank.route("a"):
            assert (outputs(model) - wanted).abs().max() <= 0.05 * wanted.abs().max()
        assert (bank.save("a", tmp_path / "b") / TENSORS).read_bytes() == (folder / TENSORS).read_bytes()

    def test_wide_adapters_on_a_narrow_base(self, tmp_path):
        """PEFT's default: float32 adapters on a bfloat16 base."""
        wanted, folder = write_with_peft(
            made(llama).bfloat16(), tmp_path / "a", PeftConfig(target_modules="all-linear")
        )
        bank = Bank(made(llama).bfloat16())
        bank.load(folder)
        assert {t.dtype for _, t in bank["a"].tensors()} == {torch.float32}
        with bank.route("a"):
            got = outputs(bank.model)
        assert got.dtype == torch.bfloat16
        assert (got - wanted).abs().max() <= 0.05 * wanted.abs().max()

    @pytest.mark.filterwarnings("ignore:.*MatMul8bitLt")
    @pytest.mark.parametrize("bits", [4, 8])
    def test_on_layers_of_bitsandbytes(self, bits, tmp_path):
        pytest.importorskip("bitsandbytes", reason="needs pip install bitsandbytes")
        made(llama).save_pretrained(tmp_path / "base")

        def quantised():
            config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
            return LlamaForCausalLM.from_pretrained(
                tmp_path / "base", quantization_config=config, dtype=torch.float32, device_map="cpu"
            ).eval()

        model = quantised()
        assert type(model.model.layers[0].self_attn.q_proj).__module__.startswith("bitsandbytes")
        wanted, folder = write_with_peft(model, tmp_path / "a", PeftConfig(r=4, target_modules="all-linear"))
        bank = Bank(quantised())
        base = outputs(bank.model)
        bank.load(folder)
        with bank.route("a"):
            assert torch.allclose(outputs(bank.model), wanted, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(wanted, base, atol=1e-2)
        with bank.route(None):
            assert torch.equal(outputs(bank.model), base)

    @pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("a_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_pairs_of_two_dtypes(self, a_dtype, base, tmp_path):
        """Some trainers save A and B each in a dtype of its own: routed, trained, merged and combined."""
        b_dtype = torch.float32 if a_dtype == torch.bfloat16 else torch.bfloat16
        config = PeftConfig(r=4, target_modules=["q_proj", "down_proj", "lm_head", "embed_tokens"])
        _, folder = write_with_peft(made(llama).to(base), tmp_path / "a", config)
        tensors = safetensors.torch.load_file(folder / TENSORS)
        cast = {
            key: tensor.to(a_dtype if "_A" in key else b_dtype) for key, tensor in tensors.items() if "lora_" in key
        }
        safetensors.torch.save_file(tensors | cast, folder / TENSORS, {"format": "pt"})
        wanted = outputs(PeftModel.from_pretrained(made(llama).to(base), folder))
        bank = Bank(made(llama).to(base))
        bank.load(folder)
        bank.load(folder, "trained", trainable=True)
        bank.combine({"a": 0.5, "trained": 0.5}, name="both")
        with bank.route("trained"):
            logits = bank.model(IDS).logits
            logits.float().sum().backward()
        assert all(parameter.grad.dtype == parameter.dtype for parameter in bank.parameters("trained"))
        found = [logits.detach()]
        for name in ("a", "both"):
            with bank.route(name):
                found.append(outputs(bank.model))
        bank.merge("a")
        found.append(outputs(bank.model))
        for got in found:
            assert (got - wanted).abs().max() <= 0.05 * wanted.abs().max()

    @pytest.mark.parametrize(
        "settings",
        [{"init_lora_weights": init} for init in ("gaussian", "orthogonal", True, False)]
        + [{"lora_dropout": 0.3}, {"ensure_weight_tying": True}, {"inference_mode": True}],
        ids=str,
    )
    def test_settings_that_only_training_knows(self, settings, tmp_path):
        config = PeftConfig(r=4, target_modules=["q_proj"], **settings)
        wanted, folder = write_with_peft(made(llama), tmp_path / "a", config)
        bank = Bank(made(llama))
        bank.load(folder)
        with bank.route("a"):
            assert torch.allclose(outputs(bank.model), wanted, atol=1e-5, rtol=1e-5)

    def test_shards(self, tmp_path):
        wanted, folder = write_with_peft(made(llama), tmp_path / "a", PeftConfig(r=4, target_modules="all-linear"))
        whole, tensors = (folder / TENSORS).read_bytes(), safetensors.torch.load_file(folder / TENSORS)
        (folder / TENSORS).unlink()
        pattern = "adapter_model{suffix}.safetensors"
        save_torch_state_dict(tensors, folder, filename_pattern=pattern, max_shard_size=len(whole) // 3)
        assert len([*folder.glob("adapter_model-*-of-*.safetensors")]) > 2
        bank = Bank(made(llama))
        bank.load(folder)
        with bank.route("a"):
            assert torch.allclose(outputs(bank.model), wanted, atol=1e-5, rtol=1e-5)
        assert (bank.save("a", tmp_path / "b") / TENSORS).read_bytes() == whole

    @pytest.mark.filterwarnings("ignore:.*changes the base weights of the model:UserWarning")
    @pytest.mark.parametrize("use_rslora", [False, True])
    @pytest.mark.parametrize("init", ["pissa", "olora"])
    def test_what_changed_the_base_loads_once_converted(self, init, use_rslora, tmp_path):
        """The way out that its refusal names."""
        config = PeftConfig(r=4, target_modules=["q_proj"], init_lora_weights=init, use_rslora=use_rslora)
        adapted = get_peft_model(made(llama), config).eval()
        own = adapted.peft_config["default"]
        own.init_lora_weights = True
        adapted.save_pretrained(tmp_path / "initial")
        own.init_lora_weights = init
        with torch.no_grad():
            for key, parameter in adapted.named_parameters():
                if "lora_" in key:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
        initial = str(tmp_path / "initial")
        adapted.save_pretrained(tmp_path / "a", path_initial_model_for_weight_conversion=initial)
        bank = Bank(made(llama))
        base = outputs(bank.model)
        bank.load(tmp_path / "a")
        with bank.route("a"):
            assert torch.allclose(outputs(bank.model), outputs(adapted), atol=1e-4, rtol=1e-4)  # W - BA + BA is rounded
        assert not torch.allclose(outputs(adapted), base, atol=1e-2)

    def test_training_goes_on_as_in_peft(self, tmp_path):
        """The same steps from the same file."""
        _, folder = write_with_peft(
            made(llama), tmp_path / "a", PeftConfig(r=4, target_modules=["q_proj", "down_proj"])
        )
        ours, theirs = Bank(made(llama)), PeftModel.from_pretrained(made(llama), folder, is_trainable=True)
        ours.load(folder, trainable=True)
        runs = []
        for model, own in (
            (ours.model, [*ours.parameters("a")]),
            (theirs, [p for p in theirs.parameters() if p.requires_grad]),
        ):
            optimizer = torch.optim.SGD(own, lr=0.05)
            losses = []
            for _ in range(3):
                with ours.route("a"):
                    loss = model(input_ids=IDS, labels=IDS).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
            runs.append(losses)
        assert runs[0] == pytest.approx(runs[1], abs=1e-5)
        assert runs[0][0] - runs[0][-1] > 1e-3


class TestCopiesOfTheBase:
    """PEFT saves targeted embeddings whole; a copy that equals the base's own is only that."""

    @pytest.fixture
    def folder(self, tmp_path):
        config = PeftConfig(r=3, target_modules=["embed_tokens", "lm_head"])
        return write_with_peft(made(llama), tmp_path / "theirs", config)[1]

    def edit(self, folder, change):
        tensors = safetensors.torch.load_file(folder / TENSORS)
        copies = [key for key in tensors if "lora_" not in key]
        assert len(copies) == 2
        change(tensors, copies[0])
        safetensors.torch.save_file(tensors, folder / TENSORS, {"format": "pt"})

    def refused(self, folder, match):
        bank = Bank(made(llama))
        with pytest.raises(AdapterError, match=match):
            bank.load(folder)
        assert bank.names() == []
        assert torch.equal(outputs(bank.model), outputs(made(llama)))

    def test_equal_ones_cost_nothing(self, folder):
        bank = Bank(made(llama))
        bank.load(folder)
        assert bank["theirs"].nbytes == 4 * 3 * (128 + 32) * 2

    @pytest.mark.parametrize("change", ["a value", "a row more", "nan"])
    def test_others_are_refused(self, folder, change):
        def apply(tensors, key):
            tensors[key] = {
                "a value": lambda t: t + (torch.arange(t.numel()).view(t.shape) == 7) * 1e-3,
                "a row more": lambda t: torch.cat([t, t[:1]]),
                "nan": lambda t: t * float("nan"),
            }[change](tensors[key]).contiguous()

        self.edit(folder, apply)
        self.refused(folder, "different numbers of rows" if change == "a row more" else "differs from this base")

    @pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_rounding_is_no_difference(self, folder, base, dtype):
        """A copy is compared as exactly as the less exact of the two dtypes."""

        def apply(tensors, _):
            tensors |= {key: tensor.to(dtype) for key, tensor in tensors.items() if "lora_" not in key}

        self.edit(folder, apply)
        bank = Bank(made(llama).to(base))
        bank.load(folder)
        assert bank["theirs"].nbytes == 4 * 3 * (128 + 32) * 2

    def test_how_far_another_base_is_and_the_consent_to_it(self, folder, caplog):
        """As a base is that was quantised and decoded again."""
        model = made(llama)
        with torch.no_grad():
            for module in (model.model.embed_tokens, model.lm_head):
                step = module.weight.abs().max() / 100
                module.weight.copy_((module.weight / step).round() * step)
        bank = Bank(model)
        with pytest.raises(
            UnsupportedError, match=r"differs from this base's weight by up to 0\.00\d+, where its largest is 0\.\d+"
        ) as caught:
            bank.load(folder)
        assert "any_base=True" in caught.value.hint_for("python")
        assert "--any-base" in caught.value.hint_for("cli")
        assert not caplog.records
        bank.load(folder, any_base=True)
        assert len([record for record in caplog.records if "base_layer.weight differs" in record.getMessage()]) == 2

    @pytest.mark.parametrize("weights", ["int8", "int4"])
    def test_a_base_in_few_bits(self, folder, weights):
        model = made(llama)
        prepare(model, weights)
        bank = Bank(model)
        with pytest.raises(UnsupportedError, match=r"differs from this base's weight by up to 0\.\d+"):
            bank.load(folder)
        bank.load(folder, any_base=True)
        dense = made(llama)
        dense.load_state_dict(model.state_dict())
        plain = Bank(dense)
        plain.load(folder, any_base=True)
        with bank.route("theirs"), plain.route("theirs"):
            assert torch.allclose(outputs(model), outputs(dense), atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("settings", [
        {"modules_to_save": ["lm_head"]}, {"modules_to_save": ["norm", "lm_head"]}, {"bias": "all"}, {"bias": "lora_only"},
    ], ids=str)  # fmt: skip
    @pytest.mark.parametrize("file", ["untrained", "without", "trained"])
    def test_whole_modules_and_biases(self, settings, file, tmp_path):
        """What equals the base's changes nothing, and so does a file without. Trained modules are the adapter's own;
        trained biases are refused, consent or no."""
        factory = lambda: llama(attention_bias=True)  # noqa: E731
        config = PeftConfig(r=2, target_modules=["q_proj"], **settings)
        wanted, folder = write_with_peft(made(factory), tmp_path / "a", config)
        tensors = safetensors.torch.load_file(folder / TENSORS)
        pairs = {key: tensor for key, tensor in tensors.items() if "lora_" in key}
        assert tensors.keys() != pairs.keys()
        if file != "trained":
            base = dict(made(factory).named_parameters())
            names = {key: key.removeprefix("base_model.model.").replace(".base_layer", "") for key in tensors}
            own = (
                {key: base[name].clone() for key, name in names.items() if name in base} if file == "untrained" else {}
            )
            assert file == "without" or own.keys() | pairs.keys() == tensors.keys()
            safetensors.torch.save_file(pairs | own, folder / TENSORS, {"format": "pt"})
            wanted = outputs(PeftModel.from_pretrained(made(factory), folder).eval()) if own else None
        bank = Bank(made(factory))
        if file == "trained" and "bias" in settings:
            for any_base in (False, True):
                with pytest.raises(UnsupportedError, match="differs from this base's weight by up to"):
                    bank.load(folder, any_base=any_base)
            return
        with bank.route(bank.load(folder)):
            assert wanted is None or torch.allclose(outputs(bank.model), wanted, atol=1e-5, rtol=1e-5)

    @pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`:UserWarning")
    @pytest.mark.parametrize("tied", [True, False])
    @pytest.mark.parametrize("targets", [["embed_tokens", "q_proj"], ["lm_head", "q_proj"], ["q_proj"]], ids=str)
    def test_tied_pairs(self, targets, tied, tmp_path):
        """The pair of a tied head is the embedding's, saved again, under a name that is no target in the file."""
        factory = lambda: llama(tie_word_embeddings=tied)  # noqa: E731
        config = PeftConfig(r=3, target_modules=targets, ensure_weight_tying=True)
        wanted, folder = write_with_peft(made(factory), tmp_path / "a", config)
        bank = Bank(made(factory))
        with bank.route(bank.load(folder)):
            assert torch.allclose(outputs(bank.model), wanted, atol=1e-5, rtol=1e-5)
        assert len(bank["a"].sites) == 2 + (len(targets) - 1) * (1 + tied)

    def test_a_copy_under_another_name(self, folder):
        def rename(tensors, key):
            tensors["base_model.model.model.nowhere.base_layer.weight"] = tensors.pop(key)

        self.edit(folder, rename)
        self.refused(folder, "belongs to no weight of this base")

    def test_on_tied_embeddings(self, tmp_path):
        config = PeftConfig(r=3, target_modules=["embed_tokens"])
        factory = lambda: llama(tie_word_embeddings=True)  # noqa: E731
        wanted, folder = write_with_peft(made(factory), tmp_path / "a", config)
        bank = Bank(made(factory))
        bank.load(folder)
        with bank.route("a"):
            assert torch.allclose(outputs(bank.model), wanted, atol=1e-5, rtol=1e-5)


class TestHalf:
    """What the configuration targets, the base has and the file lacks is named, as PEFT's missing keys are."""

    @pytest.fixture
    def folder(self, tmp_path):
        config = PeftConfig(r=3, target_modules=["q_proj", "v_proj"])
        return write_with_peft(made(llama), tmp_path / "theirs", config)[1]

    def drop(self, folder, part):
        tensors = safetensors.torch.load_file(folder / TENSORS)
        kept = {key: tensor for key, tensor in tensors.items() if part not in key}
        assert kept.keys() != tensors.keys()
        safetensors.torch.save_file(kept, folder / TENSORS, {"format": "pt"})

    def test_a_whole_one_says_nothing(self, folder, caplog):
        Bank(made(llama)).load(folder)
        assert not caplog.records

    @pytest.mark.parametrize("trainable", [False, True])
    def test_tensors_that_are_missing(self, folder, caplog, trainable):
        self.drop(folder, "layers.1.")
        bank = Bank(made(llama))
        with pytest.warns(UserWarning, match="missing adapter keys"):
            wanted = outputs(PeftModel.from_pretrained(made(llama), folder).eval())
        for name in ("first", "again"):
            bank.load(folder, name, trainable=trainable)
        first, again = (record.getMessage() for record in caplog.records)
        assert first == again
        assert "has no tensors for 2 modules that its adapter_config.json targets" in first
        assert first.endswith("model.layers.1.self_attn.q_proj, model.layers.1.self_attn.v_proj")
        with bank.route("first"):
            assert torch.allclose(outputs(bank.model), wanted, atol=1e-5, rtol=1e-5)

    def test_a_base_of_more_layers(self, folder, caplog):
        config = made(llama).config
        config.num_hidden_layers = 6
        Bank(made(lambda: LlamaForCausalLM(config))).load(folder)
        (record,) = caplog.records
        assert "for 8 modules" in record.getMessage()
        assert record.getMessage().endswith("and 3 more")

    def test_a_regex_and_what_is_left_out(self, tmp_path, caplog):
        settings = {"target_modules": r".*\.(q|k|up)_proj", "exclude_modules": ["layers.0.self_attn.k_proj"]}
        _, folder = write_with_peft(made(llama), tmp_path / "a", PeftConfig(r=2, **settings))
        Bank(made(llama)).load(folder)
        assert not caplog.records
        self.drop(folder, "up_proj")
        Bank(made(llama)).load(folder)
        assert "for 2 modules" in caplog.text
        assert "k_proj" not in caplog.text

    def test_a_regex_that_takes_too_long_is_refused(self, folder):
        table = json.loads((folder / "adapter_config.json").read_text())
        table["target_modules"] = "(.{1,200}){1,200}[!?]"
        (folder / "adapter_config.json").write_text(json.dumps(table))
        bank = Bank(made(llama))
        with pytest.raises(AdapterError, match=r"adapter_config\.json: target_modules has .* takes too long"):
            bank.load(folder)
        assert bank.names() == []


class TestOursToTheirs:
    """We write, PEFT reads, with no warning and no key left over."""

    def read_with_peft(self, model, folder, name="default"):
        """Warnings are errors here as everywhere."""
        adapted = PeftModel.from_pretrained(model, folder, adapter_name=name).eval()
        result = adapted.load_adapter(folder, "again")
        assert result.unexpected_keys == []
        assert [key for key in result.missing_keys if "lora_" in key] == []
        adapted.set_adapter(name)
        held = get_peft_model_state_dict(adapted, adapter_name=name, save_embedding_layers=False)
        file = safetensors.torch.load_file(folder / TENSORS)
        assert held.keys() == file.keys()
        assert all(torch.equal(held[key], tensor) for key, tensor in file.items())
        return adapted

    @pytest.mark.slow
    @pytest.mark.parametrize("case", CASES)
    def test_equal_outputs(self, case, fill, tmp_path):
        factory, settings = CASES[case]
        settings = {key: value for key, value in settings.items() if key != "fan_in_fan_out"}
        bank = Bank(made(FACTORIES[factory]))
        base = outputs(bank.model)
        fill(bank.add("ours", LoraConfig(**settings)), size=0.2)
        with bank.route("ours"):
            wanted = outputs(bank.model)
        folder = bank.save("ours", tmp_path / "ours")
        adapted = self.read_with_peft(made(FACTORIES[factory]), folder)
        sites = {path.removeprefix("base_model.model.") for path, m in adapted.named_modules() if hasattr(m, "lora_A")}
        assert sites == set(bank["ours"].sites)
        assert torch.allclose(outputs(adapted), wanted, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(wanted, base, atol=1e-2)

    @pytest.mark.parametrize("name", ["1", "mlp", "lora", "a.b", "weight", "lora_A"])
    def test_our_names(self, name, fill, tmp_path):
        """A name is a folder's, and never in the file: even those that PEFT itself could not bear."""
        bank = Bank(made(llama))
        for seed, own in enumerate((name, "other")):
            fill(bank.add(own, LoraConfig(r=2, target_modules=["up_proj", "q_proj"])), seed=seed, size=0.2)
            bank.save(own, tmp_path / own)
        bank.model.double()  # in float32 PEFT itself is 1.8e-5 off here: two kernels, and a base that makes much of it
        with bank.route(name):
            wanted = outputs(bank.model)
        theirs = self.read_with_peft(made(llama), tmp_path / name).double()
        assert torch.allclose(outputs(theirs), wanted, atol=1e-12, rtol=1e-12)
        bank.unload(name)
        assert bank.load(tmp_path / name) == name
        with bank.route(name):
            assert torch.equal(outputs(bank.model), wanted)

    def test_what_we_trained_and_what_we_loaded(self, fill, tmp_path):
        """Ours -> PEFT -> ours, once around: the same bytes."""
        bank = Bank(made(llama))
        fill(bank.add("a", LoraConfig(r=3, rank_pattern={"q_proj": 5}, alpha_pattern={"up_proj": 1})), size=0.2)
        folder = bank.save("a", tmp_path / "a")
        adapted = self.read_with_peft(made(llama), folder)
        adapted.save_pretrained(tmp_path / "theirs", selected_adapters=["default"])
        bank.load(tmp_path / "theirs")
        ours, theirs = dict(bank["a"].tensors()), dict(bank["theirs"].tensors())
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        assert digest(bank["a"]) == digest(bank["theirs"])

    def test_the_wrapper_class_of_a_language_model(self, fill, tmp_path):
        bank = Bank(made(llama))
        fill(bank.add("a", LoraConfig(r=2)))
        assert type(self.read_with_peft(made(llama), bank.save("a", tmp_path / "a"))).__name__ == "PeftModelForCausalLM"


def _mixtral():
    config = MixtralConfig(
        vocab_size=128, hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=1,
    )  # fmt: skip
    return MixtralForCausalLM(config)


class _Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(128, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, ids):
        x = self.embed(ids)
        return self.attention(x, x, x)[0]


REFUSED = {
    "DoRA": (llama, {"use_dora": True}, "use_dora"),
    "all biases": (lambda: llama(attention_bias=True), {"bias": "all"}, "bias"),
    "biases of the targets": (lambda: llama(attention_bias=True), {"bias": "lora_only"}, "bias"),
    "a bias of B": (llama, {"lora_bias": True, "init_lora_weights": True}, "lora_bias"),
    "trainable tokens": (llama, {"trainable_token_indices": [3, 4]}, "trainable_token_indices"),
    "trainable tokens by name": (llama, {"trainable_token_indices": {"embed_tokens": [3]}}, "trainable_token_indices"),
    "parameters": (_mixtral, {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}, "target_parameters"),
    "PiSSA": (llama, {"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    "fast PiSSA": (llama, {"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'"),
    "OLoRA": (llama, {"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
    "activated LoRA": (llama, {"alora_invocation_tokens": [5, 6], "task_type": "CAUSAL_LM"}, "alora_invocation_tokens"),
    "VeLoRA": (llama, {"velora_config": {}}, "velora_config"),
    "layer replication": (llama, {"layer_replication": [(0, 2), (1, 2)]}, "layer_replication"),
    "an attention module": (_Attends, {"target_modules": ["attention"]}, "attention module"),
}  # fmt: skip


class TestRefused:
    """What PEFT can do and we do not is refused by its name, with what to do, and nothing is half-loaded."""

    def check(self, folder, factory, match):
        bank = Bank(made(factory))
        before = outputs(bank.model)
        with pytest.raises(UnsupportedError, match=match) as caught:
            bank.load(folder)
        assert "not supported" in str(caught.value) or "only LORA" in str(caught.value)
        assert caught.value.hint
        assert bank.names() == []
        assert torch.equal(outputs(bank.model), before)
        assert not any("forward" in vars(module) for module in bank.model.modules())

    @pytest.mark.parametrize("feature", REFUSED)
    def test_made_by_peft(self, feature, tmp_path):
        factory, settings, match = REFUSED[feature]
        config = PeftConfig(**{"r": 2, "target_modules": ["q_proj"], **settings})
        _, folder = write_with_peft(made(factory), tmp_path / "a", config)
        self.check(folder, factory, match)

    @pytest.mark.parametrize("feature", REFUSED)
    def test_even_where_the_config_does_not_say_so(self, feature, tmp_path):
        """The tensors alone give most of them away; the rest would be a wrong answer without a word."""
        factory, settings, _ = REFUSED[feature]
        config = PeftConfig(**{"r": 2, "target_modules": ["q_proj"], **settings})
        _, folder = write_with_peft(made(factory), tmp_path / "a", config)
        table = json.loads((folder / "adapter_config.json").read_text())
        for key in settings.keys() - {"target_modules"}:
            table[key] = "none" if key == "bias" else None
        (folder / "adapter_config.json").write_text(json.dumps(table))
        bank = Bank(made(factory))
        if feature in ("PiSSA", "fast PiSSA", "OLoRA", "activated LoRA"):  # nothing in the tensors tells
            bank.load(folder)
            return
        with pytest.raises(AdapterError):
            bank.load(folder)
        assert bank.names() == []

    @pytest.mark.parametrize(
        "config", [IA3Config(target_modules=["k_proj"], feedforward_modules=[]), LoHaConfig(target_modules=["q_proj"])]
    )
    def test_other_methods(self, config, tmp_path):
        _, folder = write_with_peft(made(llama), tmp_path / "a", config)
        self.check(folder, llama, f"peft_type '{config.peft_type.value}'")

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("init_lora_weights", "corda"), ("init_lora_weights", "loftq"), ("init_lora_weights", "lora_ga"),
            ("init_lora_weights", "PiSSA"), ("use_qalora", True), ("use_bdlora", {"x": 1}), ("arrow_config", {"x": 1}),
            ("kasa_config", {"x": 1}), ("monteclora_config", {"x": 1}), ("megatron_config", {"x": 1}),
        ],
    )  # fmt: skip
    def test_what_is_hard_to_make(self, key, value, tmp_path):
        _, folder = write_with_peft(made(llama), tmp_path / "a", PeftConfig(r=2, target_modules=["q_proj"]))
        table = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**table, key: value}))
        self.check(folder, llama, key)

    def test_every_key_of_their_config_is_known(self):
        """A key that PEFT adds is refused when it is set, until someone has looked at what it does."""
        from loradeck.lora import peft

        known = peft.READ | peft.ORIGIN | peft.WITHOUT_EFFECT | peft.REFUSED.keys()
        assert PeftConfig().to_dict().keys() - known == set()


def test_both_in_one_bank(fill, tmp_path):
    """A file of PEFT's and one of ours, in one batch, each row as PEFT alone has it."""
    wanted = {}
    wanted["theirs"], folder = write_with_peft(
        made(llama), tmp_path / "theirs", PeftConfig(r=6, target_modules="all-linear")
    )
    bank = Bank(made(llama))
    fill(bank.add("ours", LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"])), size=0.2)
    bank.load(folder)
    bank.save("ours", tmp_path / "ours")
    wanted["ours"] = outputs(PeftModel.from_pretrained(made(llama), tmp_path / "ours").eval())
    with bank.route(["ours", "theirs", None]):
        mixed = outputs(bank.model)
    assert torch.allclose(mixed[0], wanted["ours"][0], atol=1e-5, rtol=1e-5)
    assert torch.allclose(mixed[1], wanted["theirs"][1], atol=1e-5, rtol=1e-5)
    assert torch.equal(mixed[2], outputs(made(llama))[2])


def test_a_blend_is_pefts_weighted_adapters(tmp_path):
    folders = {}
    for seed, name in enumerate(("x", "y")):
        model = made(llama)
        config = PeftConfig(r=4, lora_alpha=4 + seed, target_modules=["q_proj", "v_proj"])
        torch.manual_seed(seed)
        folders[name] = write_with_peft(model, tmp_path / name, config)[1]
    adapted = PeftModel.from_pretrained(made(llama), folders["x"], "x").eval()
    adapted.load_adapter(folders["y"], "y")
    adapted.add_weighted_adapter(["x", "y"], [0.3, 0.7], "both", combination_type="cat")
    adapted.set_adapter("both")
    bank = Bank(made(llama))
    for folder in folders.values():
        bank.load(folder)
    with bank.route({"x": 0.3, "y": 0.7}):
        assert torch.allclose(outputs(bank.model), outputs(adapted), atol=1e-5, rtol=1e-5)


def test_merging_is_pefts(tmp_path):
    _, folder = write_with_peft(
        made(gpt2), tmp_path / "a", PeftConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    )
    merged = PeftModel.from_pretrained(made(gpt2), folder).merge_and_unload()
    bank = Bank(made(gpt2))
    bank.load(folder)
    bank.merge("a")
    theirs = merged.state_dict()
    assert all(torch.allclose(tensor, theirs[key], atol=1e-6) for key, tensor in bank.model.state_dict().items())
    assert copy.deepcopy(bank.model.config).to_dict() == merged.config.to_dict()
