import re

import msgspec
import pytest
import torch
import transformers
from markdown_it import MarkdownIt

from loradeck.lora.config import LoraConfig
from loradeck.train.config import TrainConfig
from loradeck.train.events import End, Evaluation, Step
from loradeck.train.model_card import training_section

STEPS = [
    Step(
        job="poet",
        step=step,
        steps=8,
        seconds=10.0 * step,
        took=10.0,
        loss=loss,
        learning_rate=rate,
        grad_norm=1.0,
        tokens=1000 * step,
        supervised=400,
        memory=1,
    )
    for step, loss, rate in [(1, 4.0, 1e-4), (2, 1.5, 3e-4), (3, 2.0, 2e-4)]
]
EVALUATIONS = [
    Evaluation(job="poet", step=2, seconds=21, loss=1.75, tokens=1234, best=True),
    Evaluation(job="poet", step=3, seconds=31, loss=1.9, tokens=1234, best=False),
]
END = End(job="poet", step=3, seconds=3600.4, reason="early stop", kept=2, detail="no better for 1 evaluation")


def ended(**changes: object) -> End:
    return msgspec.structs.replace(END, **changes)


def section(**changes: object) -> str:
    arguments: dict = {
        "base": "hub/base",
        "source": "short-base",
        "data": {"name": "poems.jsonl", "examples": "20"},
        "lora": LoraConfig(),
        "recipe": TrainConfig(),
        "steps": STEPS,
        "evaluations": EVALUATIONS,
        "end": END,
    }
    return training_section(**arguments | changes)


def rows(text: str) -> dict[str, str]:
    """Read the tables as GitHub would."""
    cells: list[list[str]] = []
    for token in MarkdownIt("gfm-like", {"linkify": False}).parse(text):
        if token.type == "tr_open":
            cells.append([])
        if token.type == "inline" and cells:
            cells[-1].append("".join(child.content or child.tag for child in token.children or ()))
    assert {len(row) for row in cells if any(row)} >= {2}
    return {row[0]: row[1] for row in cells if row[0]}


def test_the_outcome() -> None:
    cells = rows(section())
    assert cells["ended"] == "early stop after step 3: no better for 1 evaluation"
    assert cells["kept"] == "the adapter of step 2"
    assert cells["steps"] == "3 of 8"
    assert (cells["tokens read"], cells["tokens trained on"]) == ("3,000", "1,200")
    assert re.fullmatch(r"3,600 s, until \d{4}-\d\d-\d\d", cells["time"])
    assert cells["training loss"] == "4.0000 at step 1, 2.0000 at step 3, lowest 1.5000 at step 2"
    assert cells["validation loss"] == "1.7500 at the kept step, over 1,234 tokens"


def test_data_without_a_licence_says_so() -> None:
    cells = rows(section())
    assert (cells["name"], cells["examples"]) == ("poems.jsonl", "20")
    assert cells["licence"].startswith("unknown")
    assert rows(section(data={"licence": "CC0"}))["licence"] == "CC0"


def test_the_recipe_is_what_is_not_the_default() -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 2})
    changed = rows(section(lora=lora, recipe=TrainConfig(epochs=7))).keys() - rows(section()).keys()
    assert changed == {"r", "target_modules", "rank_pattern", "epochs"}
    cells = rows(section(lora=lora, recipe=TrainConfig(epochs=7)))
    assert (cells["r"], cells["target_modules"], cells["rank_pattern"]) == ("4", "q_proj, v_proj", "q_proj: 2")
    assert cells["highest learning rate"] == "0.0003"


def test_versions() -> None:
    cells = rows(section())
    assert (cells["torch"], cells["transformers"]) == (torch.__version__, transformers.__version__)


def test_a_loss_that_was_not_measured_is_not_claimed() -> None:
    text = section(evaluations=[], end=ended(kept=3))
    assert rows(text)["validation loss"] == "not measured at the kept step"
    assert "on no held-out example" in text
    assert "on no held-out example" not in section()


def test_a_run_without_a_step_has_no_losses() -> None:
    cells = rows(section(steps=[], evaluations=[], end=ended(step=0, kept=0, reason="diverged")))
    assert cells["ended"].startswith("diverged after step 0")
    assert "training loss" not in cells
    assert "highest learning rate" not in cells


def test_preferences_have_an_accuracy() -> None:
    rated = Evaluation(job="poet", step=2, seconds=21, loss=0.5, tokens=9, best=True, accuracy=0.75, margin=1.5)
    steps = [msgspec.structs.replace(step, accuracy=0.5, margin=0.2) for step in STEPS]
    cells = rows(section(steps=steps, evaluations=[rated]))
    assert cells["validation loss"] == "0.5000 at the kept step, over 9 pairs, accuracy 75.0%, margin 1.50"
    assert cells["pairs trained on"] == "1,200"


def test_a_classifier_has_labels_and_another_use() -> None:
    rated = Evaluation(job="poet", step=2, seconds=21, loss=0.5, tokens=9, best=True, accuracy=0.75)
    steps = [msgspec.structs.replace(step, accuracy=0.5) for step in STEPS]
    text = section(steps=steps, evaluations=[rated], task="classify", labels=["neg", "pos", "so so"])
    cells = rows(text)
    assert cells["validation loss"] == "0.5000 at the kept step, over 9 labels, accuracy 75.0%"
    assert cells["labels trained on"] == "1,200"
    assert "task='classify'" in text
    assert "AutoModelForSequenceClassification" in text
    assert "num_labels=3" in text


def test_each_snippet_loads_the_base_by_its_own_name() -> None:
    ours, theirs = [token.content for token in MarkdownIt().parse(section()) if token.type == "fence"]
    assert "Base.load('short-base')" in ours
    assert "from_pretrained('hub/base')" in theirs


def test_the_snippets_are_python() -> None:
    hostile = 'x"\n```\nimport os'
    tokens = MarkdownIt().parse(section(base=hostile, source=hostile))
    snippets = [token.content for token in tokens if token.type == "fence"]
    assert len(snippets) == 2
    for code in snippets:
        compile(code, "card", "exec")
        assert "\nimport os" not in code


@pytest.mark.parametrize(
    "hostile",
    [
        "a|b",
        "a\\|b",
        "a\nb | c",
        "![x](http://evil)",
        "<img src=x>",
        "`|`",
        "\\",
        "a\x1b[2Jb",
        "[x](javascript:1)",
        "**b**",
    ],
)
def test_a_strangers_text_stays_in_its_cell(hostile: str) -> None:
    text = section(data={hostile: "here", "name": hostile}, end=ended(detail=hostile))
    shown = " ".join(hostile.split()).replace("\x1b", "\N{REPLACEMENT CHARACTER}")
    cells = rows(text)
    assert cells[shown] == "here"
    assert cells["name"] == shown
    assert "\x1b" not in text
    rendered = MarkdownIt("gfm-like", {"linkify": False}).render(text)
    assert not re.search("<(img|a|em|strong)[ >]", rendered)
