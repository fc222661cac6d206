"""Does LoRA reach full fine-tuning, at what rank, with what share of the bytes? Three tasks on SmolLM2-135M, float32.

    python -m benchmarks.quality [--seeds 0 1]    adds what results/quality.json lacks
    python -m benchmarks.quality --page           writes docs/quality.md and docs/quality.png from it

Every system sees the same batches in the same order, with the same loss, schedule and optimizer. Each has its own
learning rate for each task: the one of the lowest validation loss, with the rates on both sides tried and worse.
"""

import argparse
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from benchmarks.quality_page import DOCS, best_rate, page, plot, table
from benchmarks.record import RESULTS, write
from benchmarks.tasks import TASKS, Pair, Task
from loradeck import Bank, Base, LoraConfig, generate
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
PATH = RESULTS / "quality.json"


@dataclass(frozen=True)
class Examples:
    """A task as the base reads it: the prompt is given, the answer and the end of text are learned."""

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
    """A way to learn a task. `learn` trains at some rates, anew, and remembers the best of all it was asked for."""

    middle: int
    """Where the search for the rate begins, in half decades: 10^(middle / 2)."""
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
        found = {name: self.bench.loss(task.valid, name) for name in trainer.jobs}
        self.losses |= found
        return [*found.values()]

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
                if not norm.isfinite():  # as an adapter's training ends: with the weights before this step
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
        self.base = Base.load("smollm2-135m", dtype="float32", device="cpu")
        self.bank = Bank(self.base.model)
        self.losses = Losses(self.base.model)
        self.weights = [each.clone() for each in self.base.model.parameters()]
        self.systems: dict[str, System] = {
            "full fine-tuning": Full(self),
            "full, embeddings frozen": Full(self, embeddings=False),
            "LoRA r=1": Lora(self, LoraConfig(r=1, lora_alpha=32)),
            "LoRA r=4": Lora(self, LoraConfig(r=4, lora_alpha=32)),
            "LoRA r=16": Lora(self, LoraConfig(r=16, lora_alpha=32)),
            # exactly as many parameters as r=4 on all linear layers has
            "LoRA, attention only": Lora(
                self,
                LoraConfig(r=11, rank_pattern={"[kv]_proj": 10}, lora_alpha=32, target_modules="attention"),
            ),
        }

    @torch.no_grad()
    def restore(self, weights: Sequence[Tensor]) -> None:
        for own, kept in zip(self.base.model.parameters(), weights, strict=True):
            own.copy_(kept)

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
        """Return what counts, on the test split."""
        found = {"test loss": round(self.loss(examples.test, route), 4)}
        return found | ({"exact match": round(self.exact(task, examples, route), 4)} if task.exact else {})


def recipe(rate: float, seed: int) -> TrainConfig:
    return TrainConfig(learning_rate=rate, seed=seed, **RECIPE)  # type: ignore[arg-type]


def tuned(learn: Callable[[Sequence[float]], Sequence[float]], middle: int) -> dict[float, float]:
    """Return the validation loss by rate, over rates half a decade apart, until those beside the best are tried."""
    tried: dict[int, float] = {}
    fresh = [middle - 1, middle, middle + 1]
    while fresh:
        tried |= zip(fresh, learn([10 ** (k / 2) for k in fresh]), strict=True)
        best = min(tried, key=tried.__getitem__)
        fresh = [k for k in (best - 1, best + 1) if k not in tried]
    return {float(f"{10 ** (k / 2):.2g}"): round(tried[k], 4) for k in sorted(tried)}


def run(seeds: Sequence[int]) -> None:
    bench = Bench()
    tasks = [make() for make in TASKS]
    read = {task.name: Examples.of(task, bench.base) for task in tasks}
    figures = begun({"recipe": RECIPE, "tasks": {task.name: described(task, read[task.name]) for task in tasks}})
    for seed in seeds:
        for task in tasks:
            learned(bench, task, read[task.name], seed, figures)


def learned(bench: Bench, task: Task, examples: Examples, seed: int, figures: dict[str, Any]) -> None:
    """Add what is not yet there of one task and seed; the first seed tunes the rate for the others."""
    runs = figures["runs"].setdefault(task.name, {})
    if "base" not in runs:
        runs["base"] = bench.tested(task, examples)
        told(task, "base", figures, runs["base"])
    for name, system in bench.systems.items():
        own = runs.setdefault(name, {"valid loss by rate": {}, "seeds": {}})
        if str(seed) in own["seeds"]:
            continue
        if own["seeds"]:
            system.learn(examples, [best_rate(own)], seed)
        else:
            rates = tuned(lambda rates, learn=system.learn: learn(examples, rates, seed), system.middle)
            own |= {"parameters": system.parameters, "valid loss by rate": {f"{k:g}": v for k, v in rates.items()}}
        own["seeds"][str(seed)] = bench.tested(task, examples, system.use_best())
        system.forget()
        told(task, name, figures, own)


def described(task: Task, examples: Examples) -> dict[str, Any]:
    """Return what a reader should know of a task, and what tells whether its examples are still the same."""
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


def begun(setting: dict[str, Any]) -> dict[str, Any]:
    """Return the figures there are, if they are of this setting, and say how much there is to train."""
    for name, task in setting["tasks"].items():
        print(f"{name}: {task['train tokens'] * RECIPE['epochs']:,} tokens a run")
    old = json.loads(PATH.read_text(encoding="utf-8"))["figures"] if PATH.exists() else {}
    return old if {key: old.get(key) for key in setting} == setting else {**setting, "runs": {}}


def told(task: Task, name: str, figures: dict[str, Any], own: dict[str, Any]) -> None:
    write("quality", figures)
    print(f"{task.name:<14} {name:<22} {json.dumps(own)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--page", action="store_true")
    arguments = parser.parse_args()
    if not arguments.page:
        run(arguments.seeds)
    record = json.loads(PATH.read_text(encoding="utf-8"))
    for name, systems in record["figures"]["runs"].items():
        print("\n".join(["", name, *table(systems)]))
    if arguments.page:
        (DOCS / "quality.md").write_text(page(record), encoding="utf-8")
        plot(record)


if __name__ == "__main__":
    main()
