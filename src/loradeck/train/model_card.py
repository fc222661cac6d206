"""The training section of an adapter's model card, as markdown."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from datetime import date
from importlib.metadata import version
from typing import Any

from loradeck.lora.card import cell
from loradeck.lora.config import LoraConfig
from loradeck.train.config import TrainConfig
from loradeck.train.events import End, Evaluation, Step

PACKAGES = ("loradeck", "torch", "transformers")


def training_section(
    *,
    base: str,
    source: str,
    data: Mapping[str, str],
    lora: LoraConfig,
    recipe: TrainConfig,
    steps: Sequence[Step],
    evaluations: Sequence[Evaluation],
    end: End,
    parent: str | None = None,
    task: str = "generate",
    labels: Sequence[str] = (),
) -> str:
    """Return the card's section on training: data, recipe, how it went, versions, use, limits.

    `base` is the base's name for transformers, `source` its name for Base.load. `data` describes the dataset in rows
    (its name, form, counts, hash); without a licence the card says that it is unknown. `steps` and `evaluations` are
    the job's, in order, as `read_history` returns them. `parent` is the adapter that it went on
    from; `task` is what the base was loaded for, and `labels` are those of a classifier. All text is escaped: none of
    it can become markup.
    """
    parts = {
        "Data": _table({**data, "licence": data.get("licence", "unknown: see the dataset's own terms")}),
        "Recipe": _table(_recipe(lora, recipe, steps, parent)) + "\n\nAll other settings are loradeck's defaults.",
        "How it went": _table(_outcome(steps, evaluations, end)),
        "Versions": _table({package: version(package) for package in PACKAGES}),
        "Use": _use(base, source) if task == "generate" else _use_head(base, source, task, len(labels) or 1),
        "Limits": _limits(evaluations),
    }
    return "\n\n".join(["## Training", *(f"### {head}\n\n{part}" for head, part in parts.items())]) + "\n"


def _recipe(lora: LoraConfig, recipe: TrainConfig, steps: Sequence[Step], parent: str | None) -> dict[str, str]:
    """Return the settings that are not the defaults, and the highest learning rate of the run."""
    rows = {"goes on from": parent} if parent else {}
    rows |= {
        field.name: _text(value)
        for config in (lora, recipe)
        for field in fields(config)
        if (value := getattr(config, field.name)) != _default(field)
    }
    if steps:
        rows["highest learning rate"] = f"{max(step.learning_rate for step in steps):.3g}"
    return rows


def _default(field: Field[Any]) -> object:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _text(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {item}" for key, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(str, value))
    return f"{value}"


def _outcome(steps: Sequence[Step], evaluations: Sequence[Evaluation], end: End) -> dict[str, str]:
    rows = {"ended": f"{end.reason} after step {end.step}" + (f": {end.detail}" if end.detail else "")}
    rows["kept"] = f"the adapter of step {end.kept}"
    if steps:
        first, last, lowest = steps[0], steps[-1], min(steps, key=lambda step: step.loss)
        rows |= {
            "steps": f"{last.step:,} of {last.steps:,}",
            "tokens read": f"{last.tokens:,}",
            f"{_counted(last)} trained on": f"{sum(step.supervised for step in steps):,}",
            "time": f"{end.seconds:,.0f} s, until {date.today().isoformat()}",
            "training loss": f"{first.loss:.4f} at step {first.step}, {last.loss:.4f} at step {last.step}, "
            f"lowest {lowest.loss:.4f} at step {lowest.step}",
        }
    evaluation = next((each for each in reversed(evaluations) if each.step == end.kept), None)
    if evaluation:
        accuracy = "" if evaluation.accuracy is None else f", accuracy {evaluation.accuracy:.1%}"
        accuracy += "" if evaluation.margin is None else f", margin {evaluation.margin:.2f}"
        count = f"{evaluation.tokens:,} {_counted(evaluation)}"
        rows["validation loss"] = f"{evaluation.loss:.4f} at the kept step, over {count}{accuracy}"
    else:
        rows["validation loss"] = "not measured at the kept step"
    return rows


def _counted(event: Step | Evaluation) -> str:
    return "pairs" if event.margin is not None else "tokens" if event.accuracy is None else "labels"


def _use(base: str, source: str) -> str:
    name, loader_name = ascii(base), ascii(source)  # so that a stranger's text cannot leave its line
    return f"""With loradeck, where FOLDER is the folder of this card:

```python
from loradeck import Bank, Base, generate

base = Base.load({loader_name})
bank = Bank(base.model)
print(generate(base, bank, ["Hello!"], bank.load(FOLDER)))
```

With PEFT:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({name}), FOLDER)
```"""


def _use_head(base: str, source: str, task: str, outputs: int) -> str:
    name, loader_name = ascii(base), ascii(source)  # so that a stranger's text cannot leave its line
    kind = "TokenClassification" if task == "tokens" else "SequenceClassification"
    return f"""With loradeck, where FOLDER is the folder of this card:

```python
from loradeck import Bank, Base

base = Base.load({loader_name}, task={task!r})
bank = Bank(base.model)
with bank.route(bank.load(FOLDER)):
    logits = base.model(**base.tokenizer("Hello!", return_tensors="pt")).logits
```

With PEFT:

```python
from peft import PeftModel
from transformers import AutoModelFor{kind} as Model

model = PeftModel.from_pretrained(Model.from_pretrained({name}, num_labels={outputs}), FOLDER)
```"""


def _limits(evaluations: Sequence[Evaluation]) -> str:
    measure = "the loss on its validation examples" if evaluations else "its training loss, on no held-out example"
    return (
        f"This adapter was measured by {measure}, and by nothing else: not for truth, safety or fairness. It has the "
        "knowledge and the faults of its base and its data, and works on its own base only. Their licences and terms "
        "apply to it."
    )


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {cell(key)} | {cell(value)} |" for key, value in rows.items())])
