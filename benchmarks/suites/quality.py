"""Does LoRA reach full fine-tuning, at what rank, with what share of the bytes? Three tasks on SmolLM2-135M, float32.

    python -m benchmarks quality [--seeds 0 1] [--only "country facts"]

Every system sees the same batches in the same order, with the same loss, schedule and optimizer. Each has its own
learning rate for each task: the one of the lowest validation loss, with the rates on both sides tried and worse.
It takes about an hour. Interrupted, it continues from results/quality.json if that is of the same commit and machine.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from benchmarks.figures import PERCENT, Figure, Figures, Suite, Table
from benchmarks.harness import Run, parser, provenance, result_path, write
from benchmarks.tasks import TASKS, Pair, Task
from loradeck import Bank, Base, LoraConfig, generate
from loradeck.base.load import SMOLLM2
from loradeck.dataset.example import UNSUPERVISED, Example
from loradeck.train.batching import BatchSampler, split_units
from loradeck.train.config import PassConfig, TrainConfig
from loradeck.train.job import BETAS
from loradeck.train.loss import Losses
from loradeck.train.mode import evaluation, training
from loradeck.train.schedule import Schedule
from loradeck.train.trainer import Trainer

RECIPE = {"batch_size": 8, "epochs": 3, "warmup_ratio": 0.1, "schedule": "linear"}
ROWS = 64  # of a batch that generates
RANKS = ("LoRA r=1", "LoRA r=4", "LoRA r=16")
ATTENTION, FROZEN, FULL, BASE = "LoRA, attention only", "full, embeddings frozen", "full fine-tuning", "base"
SYSTEMS = (BASE, *RANKS, ATTENTION, FROZEN, FULL)
REACHED = 1.02  # of full fine-tuning's test loss


# ---- figures


def view(figures: Figures) -> Figures:
    """Return {task: {system: {column: number}}}, of the tasks that are complete; of several seeds the mean."""
    tasks = {}
    for task, systems in figures["runs"].items():
        if {*SYSTEMS} <= systems.keys() and all(systems[name].get("seeds", True) for name in SYSTEMS):
            full = systems[FULL]["parameters"]
            tasks[task] = {name: columns(systems[name], full) for name in SYSTEMS}
    return tasks


def columns(system: Mapping[str, Any], full: int) -> dict[str, float]:
    seeds = [*system["seeds"].values()] if "seeds" in system else [system]
    parameters = system.get("parameters", 0)
    numbers = {"trained parameters": parameters, "MB in float32": parameters * 4 / 1e6, "share": parameters / full}
    if "valid loss by rate" in system:
        numbers["learning rate"] = best_rate(system)
    return numbers | {key: mean(seed[key] for seed in seeds) for key in seeds[0]}


def best_rate(system: Mapping[str, Any]) -> float:
    losses = system["valid loss by rate"]
    return float(min(losses, key=losses.__getitem__))


def findings(figures: Figures) -> list[str]:
    """Return the answer in words."""
    tasks = view(figures)
    ratios = [
        systems[name]["learning rate"] / systems[FULL]["learning rate"] for systems in tasks.values() for name in RANKS
    ]
    times = " to ".join(dict.fromkeys(f"{ratio:.0f}" for ratio in (min(ratios), max(ratios))))
    return [
        f"*Reaches* means: a test loss at most {REACHED - 1:.0%} above that of full fine-tuning.",
        "",
        *[f"- **{task}**: {answer(systems)}" for task, systems in tasks.items()],
        f"- **learning rate**: LoRA's best is {times} times that of full fine-tuning, over all ranks and tasks; "
        "LoRA Without Regret found 10.",
        "",
        "The tasks:",
        "",
        *[description(name, task) for name, task in figures["tasks"].items()],
    ]


def description(name: str, task: Mapping[str, Any]) -> str:
    prompt, text = task["like"]
    return (
        f"- **{name}**: {task['what']} From {task['source']}. {task['train']} examples ({task['train tokens']:,} "
        f"tokens), {task['valid']} to validate, {task['test']} to test; the first: `{prompt}` → `{text}`."
    )


def answer(systems: Mapping[str, Mapping[str, float]]) -> str:
    losses = {name: systems[name]["test loss"] for name in SYSTEMS}
    full = losses[FULL]
    enough = next((name for name in RANKS if losses[name] <= REACHED * full), None)
    best = enough or min(RANKS, key=losses.__getitem__)
    verb = f"{best} reaches it" if enough else f"no rank reaches it; the nearest is {best}"
    return (
        f"{verb}, with {systems[best]['share']:.2%} of the bytes: a test loss of {losses[best]:.3f} against {full:.3f} "
        f"({losses[best] / full - 1:+.1%}). Full fine-tuning with the embeddings frozen, as LoRA leaves them: "
        f"{losses[FROZEN]:.3f}. Attention only, relative to all linear layers with as many parameters: "
        f"{losses[ATTENTION] / losses['LoRA r=4'] - 1:+.1%} loss."
    )


def draw(figures: Figures, machine: str) -> Any:
    """Draw test losses by trained parameters, and validation losses by learning rate."""
    from matplotlib.figure import Figure as Drawing

    tasks = view(figures)
    drawing = Drawing(figsize=(4.2 * len(tasks), 7.2), layout="constrained")
    rows = drawing.subplots(2, len(tasks), squeeze=False)
    for (task, systems), above, below in zip(tasks.items(), *rows, strict=True):
        sizes, losses = ([systems[rank][key] for rank in RANKS] for key in ("trained parameters", "test loss"))
        above.plot(sizes, losses, color="lightgrey", zorder=0)
        above.axhline(systems[FULL]["test loss"], color="lightgrey", linestyle=":", zorder=0)
        for n, name in enumerate(SYSTEMS[1:]):
            style: dict[str, Any] = {"color": f"C{n}", "marker": "ooosDD"[n], "label": name}
            above.plot(systems[name]["trained parameters"], systems[name]["test loss"], linestyle="", **style)
            by_rate = figures["runs"][task][name]["valid loss by rate"]
            below.plot([float(rate) for rate in by_rate], [*by_rate.values()], **style)
        above.set(xscale="log", xlabel="trained parameters", title=task, ylabel="test loss (nats per token)")
        above.set_ylim(0, 1.1 * max(systems[name]["test loss"] for name in SYSTEMS[1:]))
        below.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="validation loss (nats per token)")
    drawing.legend(*rows[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    drawing.suptitle(f"SmolLM2-135M, float32, {machine}", fontsize="medium")
    return drawing


SUITE = Suite(
    "quality",
    "Does LoRA reach full fine-tuning?",
    "SmolLM2-135M in float32, three tasks, each system at its own best learning rate",
    tuple(
        Table(
            task,
            (task, "{row}", "{column}"),
            (
                Figure("share", unit=PERCENT),
                Figure("test loss", digits=4),
                *([Figure("exact match", unit=PERCENT)] if exact else []),
            ),
        )
        for task, exact in (("number words", True), ("country facts", True), ("docstrings", False))
    ),
    """
The question is that of *LoRA Without Regret* (Thinking Machines, 2025), on a small scale.

- Batches of 8 examples, 3 epochs, linear decay after a warm-up of 10 %; AdamW, no weight decay, gradients clipped to 1.
  All systems read the same batches in the same order with the same loss, optimizer and schedule; full fine-tuning is a
  plain loop over all weights.
- LoRA has `lora_alpha=32` on all linear layers; *attention only* has r=11 on the projections of queries and outputs
  and r=10 on those of keys and values: exactly the parameters of r=4.
- Rates are half a decade apart. The search ends when the rates on both sides of the best are tried and worse, on the
  validation split. The test split is read once, with the weights after the last step.
- Losses are nats per token of the answer and its end. *Exact match* is the share of the test's answers that greedy
  decoding gives to the letter. Figures are means over the seeds, which set A's first values and the examples' order.

What it does not show: data that exceed an adapter's capacity (these are small); the noise of the seed, where there is
one; and that a difference of a few answers is more than chance: with n answers the standard error of *exact match* is
√(p(1-p)/n), 3.6 points at one half of 192.
""",
    page="quality.md",
    by_capability=False,
    view=view,
    findings=findings,
    picture="quality.svg: Test loss by trained parameters, and validation loss by learning rate",
    draw=draw,
)


# ---- systems


@dataclass(frozen=True)
class Examples:
    """A task's splits as tokens: the answer and the end of text are supervised, the prompt is not."""

    train: list[Example]
    valid: list[Example]
    test: list[Example]

    @classmethod
    def of(cls, task: Task, base: Base) -> "Examples":
        def example(pair: Pair) -> Example:
            prompt, answer = (base.tokenizer(text)["input_ids"] for text in (pair[0], f" {pair[1]}"))
            answer = [*answer, base.tokenizer.eos_token_id]
            return Example([*prompt, *answer], [UNSUPERVISED] * len(prompt) + answer)

        return cls(*([example(pair) for pair in split] for split in (task.train, task.valid, task.test)))


class System(Protocol):
    """A way to learn a task. `learn` trains from scratch at some rates, and remembers the best of all of them."""

    middle: int
    """Where the search for the rate starts, in half decades: 10^(middle / 2)."""
    parameters: int

    def learn(self, task: Examples, rates: Sequence[float], seed: int) -> list[float]:
        """Return the validation loss at each rate."""
        ...

    def use_best(self) -> str | None:
        """Return the route to the best."""
        ...

    def forget(self) -> None: ...


@dataclass
class Lora:
    """Adapters, one for each rate, trained in one pass."""

    bench: "Bench"
    config: LoraConfig
    middle: int = -6
    losses: dict[str, float] = field(default_factory=dict)
    parameters: int = 0

    def learn(self, task: Examples, rates: Sequence[float], seed: int) -> list[float]:
        base, bank = self.bench.base, self.bench.bank
        trainer = Trainer(base, bank)
        for rate in rates:
            name = f"{rate:.2g}"
            bank.add(name, self.config, generator=torch.Generator().manual_seed(seed))
            trainer.add(name, task.train, recipe(rate, seed))
            self.parameters = sum(each.numel() for each in bank.parameters(name))
        for _ in trainer:
            pass
        losses = {name: self.bench.loss(task.valid, name) for name in trainer.jobs}
        self.losses |= losses
        return [*losses.values()]

    def use_best(self) -> str:
        return min(self.losses, key=self.losses.__getitem__)

    def forget(self) -> None:
        for name in self.losses:
            self.bench.bank.unload(name)
        self.losses = {}


@dataclass
class Full:
    """All weights of the base, or all but the embeddings: a plain loop."""

    bench: "Bench"
    embeddings: bool = True
    """Whether they are trained; they are the output head's weights too."""
    middle: int = -8
    best: tuple[float, list[Tensor]] | None = None
    parameters: int = 0

    def learn(self, task: Examples, rates: Sequence[float], seed: int) -> list[float]:
        return [self._learn(task, recipe(rate, seed)) for rate in rates]

    def _learn(self, task: Examples, config: TrainConfig) -> float:
        self.bench.restore(self.bench.weights)
        model = self.bench.base.model.requires_grad_(True)
        model.get_input_embeddings().weight.requires_grad_(self.embeddings)
        weights = [each for each in model.parameters() if each.requires_grad]
        self.parameters = sum(each.numel() for each in weights)
        schedule = Schedule.of(config, len(task.train), model.config)
        batches = BatchSampler(task.train, config.batch_size, seed=config.seed)
        optimizer = AdamW(weights, betas=BETAS, weight_decay=config.weight_decay, fused=True)
        with training(model):
            for step in range(schedule.steps):
                batch = batches[step]
                with self.bench.losses.of(batch) as losses:
                    (losses.sum() / sum(example.supervised for example in batch)).backward()
                norm = nn.utils.clip_grad_norm_(weights, config.max_grad_norm)
                if not norm.isfinite():  # as in an adapter's training: the weights before this step stay
                    break
                for group in optimizer.param_groups:
                    group["lr"] = schedule(step)
                optimizer.step()
                optimizer.zero_grad()
        optimizer.zero_grad()
        model.requires_grad_(False)
        loss = self.bench.loss(task.valid)
        if self.best is None or loss < self.best[0]:
            self.best = loss, [each.clone() for each in model.parameters()]
        return loss

    def use_best(self) -> None:
        assert self.best is not None
        self.bench.restore(self.best[1])

    def forget(self) -> None:
        self.best = None
        self.bench.restore(self.bench.weights)


class Bench:
    """The base, its bank, and what is measured on them."""

    def __init__(self) -> None:
        self.base = Base.load(SMOLLM2, dtype="float32", device="cpu")
        self.bank = Bank(self.base.model)
        self.losses = Losses(self.base.model)
        self.weights = [each.clone() for each in self.base.model.parameters()]
        self.systems: dict[str, System] = {
            FULL: Full(self),
            FROZEN: Full(self, embeddings=False),
            "LoRA r=1": Lora(self, LoraConfig(r=1, lora_alpha=32)),
            "LoRA r=4": Lora(self, LoraConfig(r=4, lora_alpha=32)),
            "LoRA r=16": Lora(self, LoraConfig(r=16, lora_alpha=32)),
            # exactly as many parameters as r=4 on all linear layers has
            ATTENTION: Lora(
                self,
                LoraConfig(r=11, rank_pattern={"[kv]_proj": 10}, lora_alpha=32, target_modules="attention"),
            ),
        }

    @torch.no_grad()
    def restore(self, weights: Sequence[Tensor]) -> None:
        for parameter, weight in zip(self.base.model.parameters(), weights, strict=True):
            parameter.copy_(weight)

    @torch.no_grad()
    def loss(self, examples: Sequence[Example], route: str | None = None) -> float:
        """Return the mean -log p of a supervised token."""
        total = 0.0
        with evaluation(self.base.model), self.bank.route(route):
            for piece in split_units([(example,) for example in examples], PassConfig.max_tokens):
                with self.losses.of([example for (example,) in piece]) as losses:
                    total += float(losses.sum())
        return total / sum(example.supervised for example in examples)

    def exact(self, task: Task, examples: Examples, route: str | None = None) -> float:
        """Return the share of the test's answers that greedy decoding gives to the letter."""
        prompts = [example.tokens[: len(example.tokens) - example.supervised] for example in examples.test]
        longest = max(example.supervised for example in examples.test)
        answers: list[str] = []
        for at in range(0, len(prompts), ROWS):
            answers += generate(self.base, self.bank, prompts[at : at + ROWS], route, max_new_tokens=longest)
        return mean(answer.strip() == pair[1] for answer, pair in zip(answers, task.test, strict=True))

    def tested(self, task: Task, examples: Examples, route: str | None = None) -> dict[str, float]:
        """Return the figures on the test split."""
        figures = {"test loss": round(self.loss(examples.test, route), 4)}
        return figures | ({"exact match": round(self.exact(task, examples, route), 4)} if task.exact else {})


def recipe(rate: float, seed: int) -> TrainConfig:
    return TrainConfig(learning_rate=rate, seed=seed, **RECIPE)  # type: ignore[arg-type]


def tuned(learn: Callable[[Sequence[float]], Sequence[float]], middle: int) -> dict[float, float]:
    """Return the validation loss by rate, over rates half a decade apart, until those beside the best are tried."""
    losses: dict[int, float] = {}
    candidates = [middle - 1, middle, middle + 1]
    while candidates:
        losses |= zip(candidates, learn([10 ** (k / 2) for k in candidates]), strict=True)
        best = min(losses, key=losses.__getitem__)
        candidates = [k for k in (best - 1, best + 1) if k not in losses]
    return {float(f"{10 ** (k / 2):.2g}"): round(losses[k], 4) for k in sorted(losses)}


# ---- the run


def main(arguments: Sequence[str]) -> None:
    options = parser(SUITE, __doc__, parts=[*TASKS])
    options.add_argument("--seeds", nargs="+", type=int, default=[0])
    run = Run(SUITE, options, arguments)
    record = run.options.record and not run.partial
    bench = Bench()
    tasks = [TASKS[name]() for name in run.options.only]
    examples = {task.name: Examples.of(task, bench.base) for task in tasks}
    setting = {"recipe": RECIPE, "tasks": {task.name: described(task, examples[task.name]) for task in tasks}}
    figures = started(setting) if record else {**setting, "runs": {}}
    for seed in run.options.seeds:
        for task in tasks:
            for name, result in results(bench, task, examples[task.name], seed, figures):
                print(f"{task.name:<14} {name:<24} {json.dumps(result)}", flush=True)
                if record:
                    write(SUITE, figures)


def results(
    bench: Bench, task: Task, examples: Examples, seed: int, figures: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Add the missing results of one task and seed, and yield each; the first seed tunes the rate for the others."""
    runs = figures["runs"].setdefault(task.name, {})
    if BASE not in runs:
        runs[BASE] = bench.tested(task, examples)
        yield BASE, runs[BASE]
    for name, system in bench.systems.items():
        result = runs.setdefault(name, {"valid loss by rate": {}, "seeds": {}})
        if str(seed) in result["seeds"]:
            continue
        if result["seeds"]:
            system.learn(examples, [best_rate(result)], seed)
        else:
            rates = tuned(lambda rates, learn=system.learn: learn(examples, rates, seed), system.middle)
            result |= {"parameters": system.parameters, "valid loss by rate": {f"{k:g}": v for k, v in rates.items()}}
        result["seeds"][str(seed)] = bench.tested(task, examples, system.use_best())
        system.forget()
        yield name, result


def described(task: Task, examples: Examples) -> dict[str, Any]:
    """Return what a reader should know of a task, and a digest of its examples."""
    splits = {name: getattr(examples, name) for name in ("train", "valid", "test")}
    text = json.dumps([task.train, task.valid, task.test])
    return {
        "what": task.what,
        "source": task.source,
        "like": list(task.train[0]),
        **{name: len(split) for name, split in splits.items()},
        "train tokens": sum(len(example.tokens) for example in examples.train),
        "sha256": hashlib.sha256(text.encode()).hexdigest()[:16],
    }


def started(setting: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of an earlier run to continue, if it was of this setting, commit and machine."""
    path = result_path(SUITE)
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"figures": {}}
    figures = record["figures"]
    same = provenance(SUITE).items() <= record.items() and {key: figures.get(key) for key in setting} == setting
    return figures if same else {**setting, "runs": {}}
