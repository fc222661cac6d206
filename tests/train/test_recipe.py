from dataclasses import replace
from pathlib import Path

import pytest

from loradeck.dataset.config import DataConfig
from loradeck.errors import AdapterNameError, ConfigError
from loradeck.lora.config import LoraConfig
from loradeck.train.config import PassConfig, TrainConfig
from loradeck.train.recipe import JobRecipe, RunRecipe, read_recipe

FILE = """
base = "smollm2-135m"
max_tokens = 512
samples = 0

[defaults]
epochs = 2
r = 4

[[adapter]]
name = "pirate"
data = "pirate.jsonl"
learning_rate = 1e-3
target_modules = ["q_proj", "v_proj"]

[[adapter]]
name = "json"
data = "org/some-dataset"
r = 32
lora_alpha = 16
lora_dropout = 0.1
schedule = "cosine"
seed = 7
last_layers = 4
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_run_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "pirate.jsonl").touch()
    recipe = read_recipe(write(tmp_path, FILE))
    assert (recipe.base, recipe.dtype) == ("smollm2-135m", "auto")
    assert recipe.shared == PassConfig(max_tokens=512, samples=0)
    assert recipe.jobs == (
        JobRecipe(
            name="pirate",
            data=str(tmp_path / "pirate.jsonl"),
            lora=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
            train=TrainConfig(epochs=2, learning_rate=1e-3),
        ),
        JobRecipe(
            name="json",
            data="org/some-dataset",
            last_layers=4,
            lora=LoraConfig(r=32, lora_alpha=16, lora_dropout=0.1),
            train=TrainConfig(epochs=2, schedule="cosine", seed=7),
        ),
    )


def test_a_recipe_that_is_written_is_read_back(tmp_path: Path) -> None:
    recipe = RunRecipe(
        base="some/base",
        dtype="float32",
        shared=PassConfig(gradient_checkpointing=True, checkpoint_every=3),
        jobs=(
            JobRecipe(
                name="one",
                data='C:\\a "b"\n',
                valid="elsewhere",
                last_layers=2,
                reading=DataConfig(columns={"prompt": "The question"}, encoding="cp1252", skip_long=True),
                lora=LoraConfig(r=3, rank_pattern={"q_proj": 9}, exclude_modules=["a", "b"], use_rslora=True),
                train=TrainConfig(learning_rate=1.2345678901234567e-5, patience=3, valid_ratio=0.1, eval_every=7),
            ),
            JobRecipe(name="two", data="x", train=TrainConfig(max_grad_norm=float("inf"))),
        ),
        sweep=True,
    )
    assert read_recipe(write(tmp_path, recipe.toml())) == recipe


def test_columns_are_a_table_or_a_text(tmp_path: Path) -> None:
    for columns in ('"prompt=question, completion=answer"', '{ prompt = "question", completion = "answer" }'):
        text = f'base = "x"\n[[adapter]]\nname = "a"\ndata = "x"\nfold_system = true\ncolumns = {columns}'
        [job] = read_recipe(write(tmp_path, text)).jobs
        assert job.reading == DataConfig(columns="prompt=question,completion=answer", fold_system=True)


def test_every_problem_is_named(tmp_path: Path) -> None:
    text = """
    basis = "x"
    max_tokens = "many"
    [defaults]
    lr = 1e-3
    [[adapter]]
    name = "one"
    data = "a"
    alpha = 3
    r = "big"
    [[adapter]]
    name = "../two"
    data = "b"
    [[adapter]]
    data = 3
    epochs = 0
    """
    with pytest.raises(ConfigError) as caught:
        read_recipe(write(tmp_path, text))
    problems = "\n".join(caught.value.problems)
    for expected in (
        "adapter[0].alpha: unknown key; did you mean lora_alpha?",
        "adapter[0].r: Expected `int`, got `str`",
        "adapter[1]: ",
        "adapter[2]: epochs must be an integer of at least 1, not 0",
        "adapter[2].name: must be a string",
        "adapter[2].data: must be a string",
        "base: must be a string",
        "basis: unknown key",
        ".max_tokens: Expected `int`, got `str`",
    ):
        assert expected in problems
    assert str(tmp_path / "run.toml") in str(caught.value)
    assert [line for line in caught.value.problems if "lr" in line] == ["defaults.lr: unknown key"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('base = "x"', r"there is no \[\[adapter\]\]"),
        ('base = "x"\n[[adapter]]\nname = "a"\ndata = "x"\n[[adapter]]\nname = "a"\ndata = "y"', "two .* named 'a'"),
        ('base = "x"\nadapter = 3', "adapter a list"),
        ('base = "x"\nsweep = 1\n[[adapter]]\nname = "a"\ndata = "x"', "sweep: must be true or false"),
        ("base = ", "not valid TOML"),
        (
            'base = "x"\n[[adapter]]\nname = "a"\ndata = "x"\nlast_layers = 0',
            "last_layers must be an integer of at least 1, not 0",
        ),
        (
            'base = "x"\n[[adapter]]\nname = "a"\ndata = "x"\nlast_layers = 1\nlayers_to_transform = 1',
            "exclude each other",
        ),
        (
            'base = "x"\nkeep_checkpoints = 0\n[[adapter]]\nname = "a"\ndata = "x"',
            "keep_checkpoints must be an integer of at least 1, not 0",
        ),
    ],
)
def test_an_invalid_run_file_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        read_recipe(write(tmp_path, text))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_recipe(tmp_path / "none.toml")


def test_the_last_layers_are_numbered(tmp_path: Path) -> None:
    job = JobRecipe(name="one", data="x", last_layers=2)
    assert job.adapter_config(30) == replace(job.lora, layers_to_transform=(28, 29))
    assert replace(job, last_layers=None).adapter_config(30) == job.lora
    with pytest.raises(ConfigError, match="last_layers is 2; the base has 1"):
        job.adapter_config(1)


def test_an_invalid_name_is_refused() -> None:
    with pytest.raises(AdapterNameError):
        JobRecipe(name="a/b", data="x")
