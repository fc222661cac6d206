"""Do the defaults for preference pairs change answers? Pairs of a style on SmolLM2-135M, judged by a rule.

    python -m benchmarks preferences [--only "60 pairs"]

Each run is `loradeck train` without a flag: its batches, epochs, learning rate, beta and RPO term. About five minutes
on two quiet cores.
"""

import json
import random
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.figures import PERCENT, Figure, Suite, Table
from benchmarks.harness import Run, parser
from loradeck import Bank, Base, LoraConfig, generate
from loradeck.base.load import SMOLLM2
from loradeck.dataset.read import read_dataset
from loradeck.train.config import TrainConfig
from loradeck.train.events import AnyEvent, Step
from loradeck.train.trainer import Trainer

SYSTEM = {"role": "system", "content": "Be brief."}  # shorter than the template's own
TOPICS = (
    "bread", "tea", "soap", "paper", "glass", "honey", "rice", "salt", "wool", "coffee", "butter", "cheese", "candles",
    "shoes", "lamps", "clocks", "maps", "pens", "chairs", "boats", "bells", "ropes", "kites", "drums", "books",
    "plates", "coats", "hats", "rugs", "keys", "toys", "tents", "ladders", "mirrors", "gloves",
)  # fmt: skip
QUESTIONS = {
    "What do you think of {}?": "I think {} can be very useful.",
    "Tell me about {}.": "Many people use {} every day.",
    "Where can I buy {}?": "You can buy {} at a local shop.",
    "Do you like {}?": "Yes, I like {} very much.",
    "Should I pay a lot for {}?": "It depends on the quality of {}.",
    "Why do people need {}?": "People need {} in daily life.",
    "Who invented {}?": "Nobody knows who first made {}.",
    "How do I take care of {}?": "Keep {} in a clean and dry place.",
}
HELD_OUT = 8  # topics
PROMPTS, TOKENS = 24, 40  # of the test, and of an answer
SIZES = {"60 pairs": 60, "200 pairs": 200}

SUITE = Suite(
    "preferences",
    "Preference pairs",
    "SmolLM2-135M, pairs of a pirate's and a plain answer, all settings the defaults",
    tuple(
        Table(
            size,
            (size, "{row}"),
            (
                Figure("in style", "answers in the style", PERCENT, "≥ 0.8"),
                Figure("repeating", "answers that repeat themselves", PERCENT, "= 0"),
                Figure("base in style", "answers of the base in the style", PERCENT),
                Figure("accuracy", "accuracy at the last step", PERCENT),
                Figure("margin", "margin at the last step"),
            ),
        )
        for size in SIZES
    ),
    """
- The chosen answer begins with *Arr!* and ends with *matey!*; the rejected one is the same without. The test asks about
  topics that no pair has.
- An answer is *in the style* if it begins with *Arr* and has *matey*, and *repeats itself* if three words in a row come
  three times, or a character ten times.
""",
    by_capability=False,
)


def main(arguments: Sequence[str]) -> None:
    run = Run(SUITE, parser(SUITE, __doc__, parts=[*SIZES]), arguments)
    base = Base.load(SMOLLM2, weights="packed", device="cpu")
    for size in run.options.only:
        run.add(size, measured(base, SIZES[size]))
    run.end()


def measured(base: Base, count: int) -> dict[str, float]:
    pairs, prompts = data(count)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pairs.jsonl"
        file.write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")
        examples = read_dataset(file, base.tokenizer, TrainConfig().max_length).train
    bank, events = Bank(base.model), list[AnyEvent]()
    trainer = Trainer(base, bank, on_event=events.append)
    bank.add("pirate", LoraConfig(), generator=torch.Generator().manual_seed(0))
    trainer.add("pirate", examples, TrainConfig())
    for _ in trainer:
        pass
    last = [event for event in events if isinstance(event, Step)][-1]
    assert last.accuracy is not None
    assert last.margin is not None
    conversations = [[SYSTEM, {"role": "user", "content": prompt}] for prompt in prompts]
    answers = generate(base, bank, conversations, "pirate", max_new_tokens=TOKENS)
    plain = generate(base, bank, conversations, max_new_tokens=TOKENS)
    print(*answers[:6], sep="\n", flush=True)
    bank.detach()
    return {
        "in style": mean(map(in_style, answers)),
        "repeating": mean(map(repeats, answers)),
        "base in style": mean(map(in_style, plain)),
        "accuracy": last.accuracy,
        "margin": last.margin,
    }


def data(count: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Return pairs to train on, and prompts about other topics."""
    rng = random.Random(0)
    topics = rng.sample(TOPICS, len(TOPICS))
    questions = [
        (question.format(topic), answer.format(topic)) for topic in topics for question, answer in QUESTIONS.items()
    ]
    held_out = HELD_OUT * len(QUESTIONS)
    pairs = [
        {
            "prompt": [SYSTEM, {"role": "user", "content": question}],
            "chosen": [{"role": "assistant", "content": f"Arr! {answer[:-1]}, matey!"}],
            "rejected": [{"role": "assistant", "content": answer}],
        }
        for question, answer in rng.sample(questions[held_out:], count)
    ]
    return pairs, [question for question, _ in rng.sample(questions[:held_out], PROMPTS)]


def in_style(answer: str) -> bool:
    return answer.startswith("Arr") and "matey" in answer


def repeats(answer: str) -> bool:
    words = answer.split()
    threes = [*zip(words, words[1:], words[2:], strict=False)]
    return any(threes.count(three) > 2 for three in threes) or re.search(r"(.)\1{9}", answer) is not None
