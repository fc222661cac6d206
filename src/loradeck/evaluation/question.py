"""The questions that examples ask, and the answers of the dataset."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from loradeck.base.text import decode
from loradeck.dataset.example import UNSUPERVISED, Example, Preference


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt as token ids, up to where the answer begins, and the dataset's answer."""

    prompt: Sequence[int]
    reference: str


def questions_of(examples: Iterable[Example | Preference], tokenizer: PreTrainedTokenizerBase) -> list[Question]:
    """Return the questions of examples, in their order; of a preference pair, the one with the chosen answer.

    Every trained answer of a conversation is asked for, after all that precedes it. A text without a prompt has no
    question, and neither has an answer that was cut off.
    """
    questions: list[Question] = []
    for each in examples:
        example = each.chosen if isinstance(each, Preference) else each
        start = 0
        for trained, run in groupby(example.labels, lambda label: label != UNSUPERVISED):
            end = start + len([*run])
            whole = end < len(example.labels) or not example.truncated
            if trained and whole and _is_prompt(example.tokens[:start], tokenizer):
                questions.append(Question(example.tokens[:start], decode(tokenizer, example.tokens[start:end])))
            start = end
    return questions


def _is_prompt(tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether there is more before an answer than the tokenizer's begin of text."""
    return [*tokens] not in ([], [tokenizer.bos_token_id])
