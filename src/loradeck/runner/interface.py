"""What engines and generation ask of a model runner and of its KV cache, whichever they are."""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from loradeck.lora.adapter import Adapter
from loradeck.lora.bank import Bank
from loradeck.runner.prefix_cache import PrefixCache
from loradeck.runner.request import Key, Request, Scheduled


class Cache(Protocol):
    """The keys and values of all running requests, and of prefixes, within a budget of bytes."""

    budget: int
    prefixes: PrefixCache[Any]

    @property
    def row_bytes(self) -> int:
        """Bytes of the running requests' keys and values."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of rows and prefixes, and of memory that is kept for the next ones."""
        ...

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest row that fits the budget; 0 if none fits."""
        ...

    def reserve(self, request: Request, tokens: int) -> bool:
        """Make room for this many tokens of a request. If there is none, return False and change nothing.

        Room for more tokens may be given back. A new row starts with the known prefix of the prompt; `request.computed`
        says how long that is.
        """
        ...

    def release(self, request: Request) -> None:
        """Take a request's room back, if it has some; what it computed is kept for others."""
        ...

    def keep(self, request: Request) -> None:
        """Keep what a request has computed for others with the same prefix."""
        ...

    def clear(self) -> None:
        """Free all memory."""
        ...


class Runner(Protocol):
    """Computes batches of requests, each through its own adapters."""

    bank: Bank
    vocabulary: int

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        ...

    def new_cache(self, budget: int) -> Any:
        """Return an empty KV cache of this many bytes, of the runner's own kind."""
        ...

    def prepare(self, adapter: Adapter) -> None:
        """Do what can be done for an adapter of the bank before its first step."""
        ...

    def is_batch_invariant(self, key: Key) -> bool:
        """Whether requests with these adapters have the same bits in any batch and in any chunks.

        Only their tokens can be checked against drafts, for drafts make larger chunks.
        """
        ...

    def run(self, batch: Sequence[Scheduled], cache: Any) -> list[Tensor]:
        """Compute a step. Return the logits (S, V) of each scheduled request's last `logits_to_keep` tokens."""
        ...
