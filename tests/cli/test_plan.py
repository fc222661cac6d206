import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from loradeck.base.load import Base
from loradeck.cli.display.live_view import plan_table
from loradeck.lora.config import LoraConfig
from loradeck.train.config import TrainConfig
from loradeck.train.plan import REASONS, Plan, plan
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


@pytest.mark.parametrize("kind", ["mixtral", "qwen3-moe", "llama"])
def test_experts_that_take_no_adapter_are_named_with_their_share(
    make: Callable[[str], Base], tmp_path: Path, kind: str
) -> None:
    data = tmp_path / "data.csv"
    data.write_text("prompt,completion\nHi,Ahoy!\n")
    base = make(kind)
    parameters = dict(base.model.named_parameters())
    experts = [each.numel() for path, each in parameters.items() if ".experts." in path]
    share = sum(experts) / sum(each.numel() for each in parameters.values())
    jobs = tuple(
        JobRecipe(name=name, data=str(data), lora=LoraConfig(r=2, target_modules=targets))
        for name, targets in (("all", "all-linear"), ("some", ["q_proj"]))
    )
    run = Run(RunRecipe(base="tiny", jobs=jobs), tmp_path / "one", base)
    planned = plan(run, "all")
    assert plan(run, "some").left_out == ""
    out = io.StringIO()
    Console(file=out, width=200).print(plan_table(planned))
    if not experts:
        assert planned.left_out == ""
        assert "left out" not in out.getvalue()
        return
    assert share > 0.2
    names = "model.layers.*.mlp.experts.down_proj, model.layers.*.mlp.experts.gate_up_proj"
    assert planned.left_out == f"{share:.0%} of the base: {names}, which are bare parameters and take no adapter"
    assert planned.left_out in out.getvalue()


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
