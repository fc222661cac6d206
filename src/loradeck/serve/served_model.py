"""What answers a request: the base with adapters at their weights, as they are now, and the tokenizer of its text."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from loradeck.blend import format_blend
from loradeck.runner.request import Key
from loradeck.stored import Stored


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A route's entry as an engine resolved it: whatever is published later, it stays what it is."""

    key: Key
    adapters: Mapping[str, Stored] = field(repr=False)
    """On disk, by content hash."""
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    """The adapters' own if they have one and agree on it, else the base's."""
    stop_ids: frozenset[int] = field(repr=False)
    """Tokens that end an answer: those of the base and of the tokenizer."""
    vocabulary: int
    """How many tokens there are: those of the base, and those that its adapters add."""

    @property
    def versions(self) -> str:
        """The adapters as text, as in `poet@2*0.7+pirate@1*0.3`; "" for the base."""
        return format_blend((self.adapters[sha256].spec, weight) for sha256, weight in self.key)
