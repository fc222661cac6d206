"""What an evaluation measures. Light to import: the command line reads its flags from it."""

import re
from dataclasses import dataclass

from loradeck.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What is measured besides the loss, and how much is computed at once.

    Raises:
        ConfigError: naming every invalid value.
    """

    exact_match: bool = False
    """Answer every question and count the answers that equal the dataset's, but for white space around them."""
    pattern: str | None = None
    """A regular expression: answer every question and count the answers in which it is found."""
    samples: int = 2
    """Questions whose answers are shown side by side; 0 for none."""
    limit: int | None = None
    """Evaluate only the first N examples; left out, all."""
    max_new_tokens: int = 128
    """Maximum tokens of an answer."""
    dpo_beta: float = 0.1
    """For preference pairs: the scale of the margin, as in training."""
    max_tokens: int = 1024
    """Tokens in one forward pass, of all adapters together."""
    max_rows: int = 16
    """Answers generated in one batch, of all adapters together."""

    def __post_init__(self) -> None:
        least = {"samples": 0, "limit": 1, "max_new_tokens": 1, "max_tokens": 1, "max_rows": 1}
        values = {name: getattr(self, name) for name in least}
        problems = [
            f"{name} must be an integer of at least {least[name]}, not {value!r:.40}"
            for name, value in values.items()
            if value is not None and (type(value) is not int or not least[name] <= value < 2**31)
        ]
        if type(self.dpo_beta) not in (int, float) or not 0 < self.dpo_beta <= 1e9:
            problems.append(f"dpo_beta must be a number above 0, not {self.dpo_beta!r:.40}")
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except (re.error, RecursionError, OverflowError) as error:
                problems.append(f"pattern {self.pattern!r:.80} is not a regular expression: {error}")
        if problems:
            raise ConfigError("invalid evaluation settings", problems)

    def answered(self, questions: int) -> int:
        """Return how many of so many questions are answered."""
        return questions if self.exact_match or self.pattern is not None else min(self.samples, questions)
