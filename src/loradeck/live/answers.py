"""What an adapter in training says to prompts, computed between the steps of an engine."""

from collections.abc import Sequence

from loradeck.base.load import Base
from loradeck.base.pauses import pause
from loradeck.generation import generate
from loradeck.lora.bank import Bank
from loradeck.train.run import Answer

ANSWER_TOKENS = 48


def answerer(base: Base, bank: Bank) -> Answer:
    """Return a function that answers prompts through the adapters of a bank. It pauses between pieces.

    It takes the base's modules: the compiled step would have to be tried again after each optimizer step. Adapters with
    tokens of their own need their tokenizers, which `generate` finds by their names.
    """

    def answer(names: Sequence[str | None], prompts: Sequence[list[int]]) -> list[str]:
        if any(name is not None and bank[name].added_tokens for name in names):
            return generate(base, bank, prompts, names, max_new_tokens=ANSWER_TOKENS, on_step=lambda _: pause())
        with bank.route(names):
            return generate(base, None, prompts, max_new_tokens=ANSWER_TOKENS)

    return answer
