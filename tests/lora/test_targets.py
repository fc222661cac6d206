"""Which modules an adapter sits on, in the common architectures, and which it refuses."""

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from loradeck import Bank, LoraConfig
from loradeck.errors import AdapterError, TargetError
from loradeck.lora.targets import resolve, suffixes

# PEFT 0.21 asks transformers 5 by a name that is going away.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32}
MODELS = {
    "llama": lambda: AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)),
    "llama, tied": lambda: AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "gpt2": lambda: AutoModelForCausalLM.from_config(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32)),
    "neox": lambda: AutoModelForCausalLM.from_config(GPTNeoXConfig(**SIZES)),
    "opt": lambda: AutoModelForCausalLM.from_config(
        OPTConfig(hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=32, word_embed_proj_dim=16)
    ),
    "bert": lambda: BertForMaskedLM(BertConfig(**SIZES)),
    "bert for classes": lambda: AutoModelForSequenceClassification.from_config(BertConfig(**SIZES)),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(d_model=16, d_ff=24, d_kv=8, num_layers=2, num_heads=2, vocab_size=32, decoder_start_token_id=0)
    ),
}  # fmt: skip
ATTENTION = {  # the names, and how many there are
    "llama": ({"q_proj", "k_proj", "v_proj", "o_proj"}, 8),
    "gpt2": ({"c_attn", "c_proj"}, 4),
    "neox": ({"query_key_value", "dense"}, 4),
    "opt": ({"q_proj", "k_proj", "v_proj", "out_proj"}, 8),
    "bert": ({"query", "key", "value", "dense"}, 8),
    "t5": ({"q", "k", "v", "o"}, 24),
}
HEADS = {
    "llama": "lm_head", "llama, tied": "lm_head", "gpt2": "lm_head", "neox": "lm_head", "opt": "lm_head",
    "bert": "cls.predictions.decoder", "bert for classes": "classifier", "t5": "lm_head",
}  # fmt: skip


@pytest.fixture(scope="module")
def models():
    made = {}

    def get(name):
        if name not in made:
            torch.manual_seed(0)
            made[name] = MODELS[name]().eval().requires_grad_(False)
        return made[name]

    return get


def targets(model, **config):
    return list(resolve(model, LoraConfig(**config)))


class TestArchitectures:
    """The two words that stand for many names."""

    @pytest.mark.parametrize("name", MODELS)
    def test_all_linear_is_all_but_the_head(self, models, name):
        model = models(name)
        kinds = ("Linear", "Conv1D")
        linears = {path for path, module in model.named_modules() if type(module).__name__ in kinds}
        assert linears - set(targets(model)) == {HEADS[name]}

    @pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "opt", "bert", "t5"])
    def test_all_linear_is_pefts(self, models, name):
        model = MODELS[name]()
        ours = set(targets(model))
        adapted = get_peft_model(model, PeftConfig(target_modules="all-linear", fan_in_fan_out=name == "gpt2"))
        theirs = {path.removeprefix("base_model.model.") for path, m in adapted.named_modules() if hasattr(m, "lora_A")}
        assert ours == theirs

    @pytest.mark.parametrize("name", ATTENTION)
    def test_attention(self, models, name):
        found = targets(models(name), target_modules="attention")
        names, count = ATTENTION[name]
        assert {path.rpartition(".")[2] for path in found} == names
        assert len(found) == count

    @pytest.mark.parametrize("name", ["gpt2", "neox", "opt", "bert", "t5"])
    def test_an_adapter_on_all_of_it_acts(self, models, name, fill):
        torch.manual_seed(0)
        model = MODELS[name]().eval().requires_grad_(False)
        ids = torch.randint(3, 32, (3, 5))
        inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if name == "t5" else {})
        bank = Bank(model)
        fill(bank.add("a", LoraConfig(r=2, lora_alpha=16)), size=0.3)
        with torch.no_grad():
            base = model(**inputs).logits
            with bank.route(["a", None, {"a": -0.5}]):
                mixed = model(**inputs).logits
            for row, entry in enumerate(["a", None, {"a": -0.5}]):
                with bank.route(entry):
                    alone = model(**{key: value[row : row + 1] for key, value in inputs.items()}).logits[0]
                assert (mixed[row] - alone).abs().max() <= 1e-5 * max(1.0, alone.abs().max().item())
                assert torch.equal(mixed[row], base[row]) == (entry is None)


class TestChoosing:
    """Suffixes, a regex, and what is taken out again."""

    def test_suffixes_end_at_a_dot(self, models):
        llama = models("llama")
        assert targets(llama, target_modules=["q_proj"]) == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
        assert targets(llama, target_modules=["0.self_attn.q_proj"]) == ["model.layers.0.self_attn.q_proj"]
        assert targets(llama, target_modules=["lm_head", "model.embed_tokens"]) == ["model.embed_tokens", "lm_head"]
        with pytest.raises(TargetError):
            targets(llama, target_modules=["_proj"])

    def test_a_regex_is_for_the_whole_path(self, models):
        llama = models("llama")
        assert targets(llama, target_modules=r".*\.(q|k)_proj") == [
            f"model.layers.{i}.self_attn.{name}_proj" for i in (0, 1) for name in "qk"
        ]
        assert targets(llama, target_modules=r"lm_head|.*1\.mlp\.up_proj") == ["model.layers.1.mlp.up_proj", "lm_head"]
        with pytest.raises(TargetError):
            targets(llama, target_modules=r"q_proj")

    def test_what_is_excluded(self, models):
        llama = models("llama")
        every = set(targets(llama))
        assert every - set(targets(llama, exclude_modules=["q_proj", "1.mlp.up_proj"])) == {
            "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj",
        }  # fmt: skip
        assert set(targets(llama, exclude_modules=r".*self_attn.*")) == {path for path in every if "mlp" in path}
        assert targets(llama, target_modules=["q_proj", "lm_head"], exclude_modules="lm_head|.*0.*") == [
            "model.layers.1.self_attn.q_proj"
        ]

    def test_layers(self, models):
        llama, t5 = models("llama"), models("t5")
        assert targets(llama, target_modules=["q_proj"], layers_to_transform=1) == ["model.layers.1.self_attn.q_proj"]
        assert set(targets(llama, layers_to_transform=[1])) == {path for path in targets(llama) if ".1." in path}
        assert set(targets(llama, layers_to_transform=(0, 1))) == set(targets(llama))
        assert targets(t5, target_modules=["SelfAttention.q"], layers_to_transform=0, layers_pattern="block") == [
            f"{part}.block.0.layer.0.SelfAttention.q" for part in ("encoder", "decoder")
        ]
        assert all(
            ".layer.1." in path
            for path in targets(t5, target_modules=["wi", "q"], layers_to_transform=1, layers_pattern=["layer"])
        )
        for nothing in (7, [2, 3], -1):
            with pytest.raises(TargetError, match="exclude all of"):
                targets(llama, layers_to_transform=nothing)

    def test_layers_are_pefts(self):
        for config in (
            {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
            {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
            {"target_modules": r".*\.[qk]_proj", "exclude_modules": ["layers.0.self_attn.q_proj"]},
            {"target_modules": ["v_proj", "o_proj"], "exclude_modules": r".*\.1\..*"},
        ):
            model = MODELS["llama"]()
            ours = set(targets(model, **config))
            adapted = get_peft_model(model, PeftConfig(**config))
            found = {path for path, m in adapted.named_modules() if hasattr(m, "lora_A")}
            assert ours == {path.removeprefix("base_model.model.") for path in found}


class TestRefusals:
    """What cannot be a target is named, with what to do."""

    def test_nothing_matches(self, models):
        with pytest.raises(TargetError, match=r"q_projj.*\n.*q_proj"):
            targets(models("llama"), target_modules=["q_projj"])
        with pytest.raises(TargetError, match=r"match no module.*\n.*Available: .*down_proj"):
            targets(models("llama"), target_modules=["zzz"])
        with pytest.raises(TargetError, match=r"it has no nn\.Linear"):
            targets(nn.Sequential(nn.ReLU()), target_modules=["zzz"])
        with pytest.raises(TargetError):
            targets(nn.Sequential(nn.ReLU()))
        with pytest.raises(TargetError, match="no module"):
            targets(nn.Linear(2, 2), target_modules=[""])

    def test_types_that_take_none(self, models):
        with pytest.raises(TargetError) as caught:
            targets(models("llama"), target_modules=["norm", "q_proj", "mlp"])
        assert len(caught.value.problems) == 3
        assert "model.norm is a LlamaRMSNorm, which takes no adapter" in str(caught.value)
        assert "model.layers.0.mlp is a LlamaMLP" in str(caught.value)
        for module in (
            nn.Conv3d(1, 1, 1),
            nn.ConvTranspose1d(1, 1, 1),
            nn.Bilinear(1, 1, 1),
            nn.LSTM(2, 2),
            nn.EmbeddingBag(2, 2),
        ):
            with pytest.raises(TargetError, match=f"x is a {type(module).__name__}, which takes no adapter"):
                targets(nn.ModuleDict({"x": module}), target_modules=["x"])
        with pytest.raises(TargetError, match="reflect"):
            targets(nn.ModuleDict({"x": nn.Conv1d(2, 2, 3, padding=1, padding_mode="reflect")}), target_modules=["x"])

    def test_groups_that_do_not_divide_the_rank(self):
        model = nn.ModuleDict({"x": nn.Conv1d(6, 6, 1, groups=3)})
        with pytest.raises(TargetError, match="3 groups; r=4 is not a multiple"):
            targets(model, target_modules=["x"], r=4)
        assert targets(model, target_modules=["x"], r=4, rank_pattern={"x": 6}) == ["x"]

    @pytest.mark.parametrize("closed", [nn.MultiheadAttention, nn.TransformerEncoderLayer])
    def test_layers_that_are_never_called(self, closed, tmp_path):
        """An adapter there would sit and do nothing, without a word."""
        model = nn.ModuleDict({"x": closed(8, 2), "after": nn.Linear(8, 8)})
        inner = "x.out_proj" if closed is nn.MultiheadAttention else "x.linear1"
        for name in ([inner], [inner.removeprefix("x.")], inner.replace(".", r"\.")):
            with pytest.raises(TargetError, match=f"{inner} is inside a {closed.__name__}"):
                targets(model, target_modules=name)
        assert targets(model) == ["after"]
        with pytest.raises(TargetError, match="takes no adapter"):
            targets(model, target_modules=["x"])
        # A file made elsewhere is refused alike.
        other = Bank(nn.ModuleDict({"x": nn.ModuleDict({inner.removeprefix("x."): nn.Linear(8, 8)})}))
        shape = model.get_submodule(inner).weight.shape
        other.model["x"][inner.removeprefix("x.")] = nn.Linear(shape[1], shape[0])
        other.add("a", LoraConfig(r=2, target_modules=[inner]))
        other.save("a", tmp_path / "a")
        with pytest.raises(AdapterError, match=f"is inside a {closed.__name__}"):
            Bank(model).load(tmp_path / "a")

    def test_a_decoder_layer_calls_its_linears(self, fill):
        model = nn.ModuleDict({"x": nn.TransformerDecoderLayer(8, 2, 16, dropout=0, batch_first=True)}).eval()
        assert targets(model) == ["x.linear1", "x.linear2"]


class TestSuffixes:
    """The endings that are written for PEFT match exactly the modules that were adapted."""

    @pytest.mark.parametrize(
        "config",
        [{}, {"target_modules": "attention"}, {"target_modules": ["q_proj"], "layers_to_transform": 1},
         {"exclude_modules": ["0.mlp.up_proj"]}, {"target_modules": ["lm_head", "embed_tokens"]}],
        ids=str,
    )  # fmt: skip
    def test_they_match_exactly(self, models, config):
        llama = models("llama")
        wanted = targets(llama, **config)
        short = suffixes([path for path, _ in llama.named_modules()], wanted)
        assert targets(llama, target_modules=short) == wanted
        assert list(short) == sorted(short)
        assert len(short) <= len(wanted)
        # Shortest: no ending of one of them would do.
        for ending in short:
            shorter = ending.partition(".")[2]
            assert not shorter or not set(targets_or_none(llama, shorter)) <= set(wanted)

    def test_a_path_that_is_the_end_of_another(self):
        """`linear` ends `sub.linear` too; PEFT takes a list as endings, so the list alone could not tell them apart."""
        model = nn.ModuleDict({"linear": nn.Linear(2, 2), "sub": nn.ModuleDict({"linear": nn.Linear(2, 2)})})
        model["other"] = nn.ModuleDict({"q": nn.Linear(2, 2), "attention": nn.Linear(2, 2)})
        bank = Bank(model)
        for i, regex in enumerate((r"linear", r"linear|other\.q", r"other\.attention", r"linear|.*attention")):
            adapter = bank.add(str(i), LoraConfig(r=2, target_modules=regex))
            assert (
                set(resolve(model, adapter.config)) == set(adapter.sites) == set(targets(model, target_modules=regex))
            )
            adapted = get_peft_model(
                nn.ModuleDict(dict(model.items())), PeftConfig(target_modules=_list(adapter.config))
            )
            found = {
                path.removeprefix("base_model.model.") for path, m in adapted.named_modules() if hasattr(m, "lora_A")
            }
            assert found == set(adapter.sites)
            adapted.unload()


def _list(config):
    return config.target_modules if isinstance(config.target_modules, str) else [*config.target_modules]


def targets_or_none(model, ending):
    return [path for path, _ in model.named_modules() if path == ending or path.endswith("." + ending)]
