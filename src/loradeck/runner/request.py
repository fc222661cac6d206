"""One request as the engine sees it: token ids, and adapters by the hash of their content."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from loradeck.runner.speculation import Acceptance, PromptLookup
from loradeck.sampling import TokenSequence

Key: TypeAlias = tuple[tuple[str, float], ...]
"""A request's adapters as sorted (sha256, weight); () is the base. Every cache key begins with it (invariant 7)."""
Finish: TypeAlias = Literal["stop", "length", "cancelled", "failed"]


@dataclass(eq=False, slots=True)
class Request(TokenSequence):
    """A prompt and the answer so far, on its way through the engine."""

    key: Key = ()
    id: str = ""
    adapter: str = ""
    """The client's name for its adapters, for people and metrics; "" is the base."""
    versions: str = ""
    """Which versions of them it got, as in `poet@2*0.7+pirate@1*0.3`."""
    tenant: str = ""
    """An API key's name: tenants of the same adapters share them fairly."""
    arrived: float = 0.0
    """time.monotonic() at arrival; so are the next three, 0 until they happen."""
    admitted: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0
    computed: int = 0
    """How many of `tokens` have their keys and values in the KV cache."""
    cached: int = 0
    """Prompt tokens found in the prefix cache."""
    cancelled: bool = False
    """Nobody waits for it any more; it is dropped at the next step."""
    lookup: PromptLookup = field(init=False, default_factory=PromptLookup)
    acceptance: Acceptance = field(init=False, default_factory=Acceptance)
    """Of drafts that were looked up."""
    model_acceptance: Acceptance | None = field(init=False, default=None)
    """Of a draft model's; created with the first ones."""

    @property
    def pending(self) -> int:
        """Tokens to compute before the next one can be sampled."""
        return len(self.tokens) - self.computed


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A request's share of a step: its next `count` tokens, and drafts of those after them."""

    request: Request
    count: int
    drafts: Sequence[int] = ()
    """Only if the request's next token can be sampled after the others."""

    @property
    def tokens(self) -> Sequence[int]:
        """All tokens to compute."""
        request = self.request
        return [*request.tokens[request.computed : request.computed + self.count], *self.drafts]

    @property
    def ends(self) -> bool:
        """Whether the request's next token can be sampled afterwards."""
        return self.count == self.request.pending

    @property
    def logits_to_keep(self) -> int:
        """How many of the tokens, counted from the end, need logits."""
        request = self.request
        if request.sampling.prompt_logprobs is not None and request.computed < len(request.prompt) - 1:
            return self.count + len(self.drafts)
        return int(self.ends) + len(self.drafts)
