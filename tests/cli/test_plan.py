import io
from pathlib import Path

import pytest
from rich.console import Console

from loradeck.base.load import Base
from loradeck.cli.display.live_view import plan_table
from loradeck.cli.display.plan import REASONS, Plan, plan
from loradeck.lora.config import LoraConfig
from loradeck.train.config import TrainConfig
from loradeck.train.recipe import JobRecipe, RunRecipe
from loradeck.train.run import Run

LINES = ["Hi|Ahoy!", "Bye|Fair winds", "2+2?|4"]


@pytest.fixture
def planned(base: Base, tmp_path: Path) -> tuple[Plan, Run]:
    data = tmp_path / "data.csv"
    data.write_text("\n".join(["prompt,completion", *(line.replace("|", ",") for line in LINES)]))
    lora = LoraConfig(r=4, target_modules=["q_proj"])
    job = JobRecipe(name="one", data=str(data), lora=lora, train=TrainConfig(batch_size=2, epochs=2))
    other = JobRecipe(name="other", data=str(data), lora=LoraConfig(r=64), train=TrainConfig(max_steps=3))
    run = Run(RunRecipe(base="tiny", jobs=(job, other)), tmp_path / "one", base)
    return plan(run, "one"), run


def test_a_plan_is_what_the_run_does(planned: tuple[Plan, Run], base: Base) -> None:
    expected, run = planned
    alone = sum(parameter.nbytes for name, parameter in base.model.named_parameters() if "loradeck" not in name)
    assert expected.trainable == sum(parameter.numel() for parameter in run.bank.parameters("one"))
    assert (expected.adapter_bytes, expected.base_bytes) == (4 * expected.trainable, alone)
    assert (expected.form, expected.examples, expected.valid, expected.truncated, expected.batch_size) == (
        "prompt and completion",
        3,
        0,
        0,
        2,
    )
    train = run.data["one"].train
    assert expected.longest == max(len(example.tokens) for example in train)
    assert expected.tokens == sum(len(example.tokens) for example in train)
    assert expected.supervised == sum(len(line.partition("|")[2]) + 1 for line in LINES)
    run.begin()
    run.train()
    progress = run.trainer.jobs["one"].progress
    assert (expected.schedule.steps, 2 * expected.tokens) == (progress.step, progress.tokens)


def test_settings_have_reasons(planned: tuple[Plan, Run]) -> None:
    settings = planned[0].settings
    assert settings["r"] == ("4", "as given")
    assert settings["lora_alpha"] == ("32", REASONS["lora_alpha"])
    assert settings["epochs"] == ("2", "as given")
    assert settings["lora_dropout"] == ("0.0", REASONS["lora_dropout"])
    assert "patience" not in settings
    other = plan(planned[1], "other").settings
    assert other["max_steps"] == ("3", "as given")
    assert "epochs" not in other


def test_the_first_example_is_shown_with_its_mask(planned: tuple[Plan, Run]) -> None:
    expected = planned[0]
    assert expected.first == [
        ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", False),
        ("Ahoy!<|im_end|>", True),
    ]
    file = io.StringIO()
    Console(file=file, width=120).print(plan_table(expected))
    assert "learned  Ahoy!<|im_end|>" in file.getvalue()
    assert "read     <|im_start|>user" in file.getvalue()
    assert "at most" in file.getvalue()
    assert REASONS["lora_alpha"] in file.getvalue()
