"""Text from prompts, each through its own adapter: a whole batch at once, or one answer as a stream."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from loradeck.base.compat import cache_argument
from loradeck.base.load import Base
from loradeck.base.text import Detokenizer, Prompt, decode, encode, pad_left, stop_ids
from loradeck.errors import ConfigError, RouteError
from loradeck.native.adapter import NativeAdapter
from loradeck.runner.activations import Activations
from loradeck.runner.native_batch import NativeBatch, native_model, packed_adapter
from loradeck.sampling import SamplingParams, Token, TokenSequence, next_tokens

if TYPE_CHECKING:
    from loradeck.lora.adapter import Adapter
    from loradeck.lora.bank import Bank
    from loradeck.lora.routing import RouteEntry

log = logging.getLogger(__name__)
_reported: "WeakSet[Adapter]" = WeakSet()  # those of which the log says that the step cannot compute them


def generate(
    base: Base,
    bank: "Bank | None",
    prompts: Sequence[Prompt],
    adapters: "RouteEntry | Sequence[RouteEntry]" = None,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    activations: Activations = "auto",
    on_step: Callable[[int], None] | None = None,
) -> list[str]:
    """Return one completion per prompt, computed as one batch, without the token that ended its turn.

    A prompt is a string or a list of messages. `adapters` is one entry for the whole batch (a name, `{name: weight}`,
    or None for the base alone) or a list with one entry per prompt. A temperature of 0 takes the likeliest token; above
    it, `top_p` keeps the smallest set of tokens whose probabilities add up to it, and `seed` makes the choices
    repeatable: the prompt at index i draws with seed + i. An answer ends early at the base's context.
    A tokenizer or chat template in an adapter's folder encodes its prompts, and decodes and ends its answers.
    `activations` are what quantised weights are multiplied with in the compiled step, as in an engine's settings.
    `on_step` is called after each step with the number of tokens that the longest answer has.

    Raises:
        ConfigError: no prompt, an empty one, one longer than the context, a number out of its bounds, or int8
            activations for a base that takes none.
        RouteError: adapters that do not fit the prompts, or no bank that holds them.
        UnknownAdapterError: a name that is not resident.
        AdapterError: an adapter's own tokenizer cannot be used.
        RequestError: the logits are NaN or Inf.
    """
    if isinstance(prompts, str) or not prompts:
        raise ConfigError("prompts is not a list with at least one prompt", hint="Give a list: [prompt].")
    entries = _entries(adapters, len(prompts))
    if len(entries) != len(prompts):
        raise RouteError(
            f"the numbers of adapters and prompts differ: {len(entries)} and {len(prompts)}",
            hint="Give one entry per prompt, or one for all.",
        )
    tokenizers = tokenizers_of(base, bank, entries)
    sequences = _sequences(base, bank, entries, tokenizers, prompts, max_new_tokens, temperature, top_p, seed)
    for _ in _steps(base, bank, sequences, adapters, activations):
        if on_step is not None:
            on_step(max(sequence.generated for sequence in sequences))
    answers = [sequence.tokens[len(sequence.prompt) :] for sequence in sequences]
    return [decode(tokenizer, answer) for tokenizer, answer in zip(tokenizers, answers, strict=True)]


def stream(
    base: Base,
    bank: "Bank | None",
    prompt: Prompt,
    adapter: "RouteEntry" = None,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    activations: Activations = "auto",
) -> Iterator[str]:
    """Yield one completion in pieces as they come; joined, they are what `generate` returns for the prompt alone.

    The model runs in the thread that iterates, one token at a time, and stops when the iteration does. The arguments
    are checked before this returns; they and the errors are those of `generate`.
    """
    _route(bank, adapter)  # raises now if the adapter is unknown, not at the first piece
    tokenizers = tokenizers_of(base, bank, [adapter])
    sequences = _sequences(base, bank, [adapter], tokenizers, [prompt], max_new_tokens, temperature, top_p, seed)
    text = Detokenizer(tokenizers[0])
    steps = _steps(base, bank, sequences, adapter, activations)
    return (piece for tokens in steps for token in tokens.values() if (piece := text.push(token.id)))


def tokenizers_of(base: Base, bank: "Bank | None", entries: "Sequence[RouteEntry]") -> list[PreTrainedTokenizerBase]:
    """Return the tokenizer of a row of each entry: of adapters that agree on one of their own, else the base's.

    Raises:
        RouteError: an invalid entry, or no bank that holds the adapters.
        UnknownAdapterError: a name that is not resident.
        AdapterError: an adapter's own tokenizer cannot be used.
    """
    from loradeck.lora.routing import weights_of

    tokenizers = []
    for entry in entries:
        adapters = [_present(bank)[name] for name, _ in weights_of(entry)]
        tokenizers.append(base.adapter_tokenizers.of(adapter.tokenizer_files for adapter in adapters))
    return tokenizers


def _vocabulary(base: Base, bank: "Bank | None", entry: "RouteEntry", tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return how many tokens a row of an entry may choose from; None for all that the model has."""
    from loradeck.lora.added_rows import shared_count
    from loradeck.lora.routing import weights_of

    embedding, weights = base.model.get_input_embeddings(), weights_of(entry)
    if not isinstance(embedding, nn.Embedding):
        return None
    if bank is None or (len(weights) > 1 and tokenizer is base.tokenizer):  # a blend whose tokenizers differ
        return embedding.num_embeddings
    return embedding.num_embeddings + shared_count((bank[name].added_tokens, weight) for name, weight in weights)


def _entries(adapters: "RouteEntry | Sequence[RouteEntry]", count: int) -> "list[RouteEntry]":
    return [*adapters] if isinstance(adapters, Sequence) and not isinstance(adapters, str) else [adapters] * count


def _sequences(
    base: Base,
    bank: "Bank | None",
    entries: "Sequence[RouteEntry]",
    tokenizers: Sequence[PreTrainedTokenizerBase],
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
) -> list[TokenSequence]:
    """Encode the prompts; the longest one bounds the tokens of all answers."""
    base.check_generates()
    rows = [encode(tokenizer, prompt) for tokenizer, prompt in zip(tokenizers, prompts, strict=True)]
    length = answer_length(base, rows, max_new_tokens)
    return [
        TokenSequence(
            row,
            SamplingParams(
                max_tokens=length, temperature=temperature, top_p=top_p, seed=None if seed is None else seed + i
            ),
            stop_ids=stop_ids(tokenizer, base.model.generation_config),
            vocabulary=_vocabulary(base, bank, entry, tokenizer),
        )
        for i, (tokenizer, row, entry) in enumerate(zip(tokenizers, rows, entries, strict=True))
    ]


@torch.no_grad()
def _steps(
    base: Base,
    bank: "Bank | None",
    sequences: Sequence[TokenSequence],
    adapters: "RouteEntry | Sequence[RouteEntry]",
    activations: Activations,
) -> Iterator[dict[int, Token]]:
    """Continue all sequences and yield the next token of some of them, by their index, again and again until all end.

    The token that ends a turn is neither appended nor yielded.
    """
    batch = _native_batch(base, bank, sequences, adapters, activations)
    batch = batch or _Batch(base, [sequence.prompt for sequence in sequences])
    running = len(sequences)
    while running:
        with _route(bank, adapters):  # not across a yield: it would be the reader's route too
            rows, logits = batch.forward()
        tokens: dict[int, Token] = {}
        for i, token in zip(rows, next_tokens(logits, [sequences[i] for i in rows]), strict=True):
            if isinstance(token, Exception):
                raise token
            if not token.ends:
                sequences[i].tokens.append(token.id)
                tokens[i] = token
        if tokens:
            yield tokens
        ends = {i for i in rows if i not in tokens or sequences[i].generated == sequences[i].sampling.max_tokens}
        batch.append({i: None if i in ends else tokens[i].id for i in rows})
        running -= len(ends)


def _native_batch(
    base: Base,
    bank: "Bank | None",
    sequences: Sequence[TokenSequence],
    adapters: "RouteEntry | Sequence[RouteEntry]",
    activations: Activations,
) -> NativeBatch | None:
    """Return the sequences as the compiled step computes them, each through its adapters; None if it cannot."""
    from loradeck.lora.routing import is_open, weights_of

    native = (
        None if is_open() else native_model(base.model, activations)
    )  # a route of the caller's applies to the modules
    if native is None:
        return None

    entries = _entries(adapters, len(sequences))
    packed: dict[str, NativeAdapter] = {}
    with _route(bank, adapters):  # raises if an adapter is unknown
        for entry in entries:
            for name, _ in weights_of(entry):
                if bank is None or name in packed:
                    continue
                try:
                    packed[name] = packed_adapter(native, bank[name])
                except ValueError as error:
                    if bank[name] not in _reported:
                        _reported.add(bank[name])
                        log.warning("answers with %s are computed by transformers' modules: %s", name, error)
                    return None
    uses = [tuple((packed[name], weight) for name, weight in weights_of(entry)) for entry in entries]
    return NativeBatch(native, [sequence.prompt for sequence in sequences], uses, sequences[0].sampling.max_tokens)


class _Batch:
    """Rows of a model's input, padded on the left, and the cache of what it has read.

    N rows   T tokens, padding included   V vocabulary
    """

    def __init__(self, base: Base, rows: Sequence[Sequence[int]]) -> None:
        self.model = base.model
        self._running = [*range(len(rows))]
        self.pad: int = base.tokenizer.pad_token_id or 0  # masked, so any token will do
        self._cache_name = cache_argument(type(self.model))
        self._accepted = signature(type(self.model).forward).parameters
        self._cache: Any = None
        self._unread, mask = (tensor.to(self.model.device) for tensor in pad_left(rows, self.pad))
        padded = not mask.all()
        self._mask = mask if padded else None  # without padding, attention is plainly causal
        self._positions = (mask.cumsum(-1) - 1).clamp(min=0) if padded else None

    def forward(self) -> tuple[list[int], Tensor]:
        """Read the new tokens; return the rows that have not ended, and the logits (N, V) of what follows them."""
        inputs = {
            "attention_mask": self._mask,
            "position_ids": self._positions,
            self._cache_name: self._cache,
            "use_cache": True,
            "logits_to_keep": 1,
        }
        accepted = {name: value for name, value in inputs.items() if value is not None and name in self._accepted}
        output = self.model(input_ids=self._unread, **accepted)
        self._cache = output.get(self._cache_name)
        logits = output.logits[:, -1]
        return self._running, logits if len(self._running) == len(logits) else logits[self._running]

    def append(self, tokens: Mapping[int, int | None]) -> None:
        """Add the next token of each row that `forward` returned; None to one that ends."""
        self._running = [i for i, token in tokens.items() if token is not None]
        padded = [self.pad if (token := tokens.get(i)) is None else token for i in range(len(self._unread))]
        new = torch.tensor(padded, device=self._unread.device)[:, None]
        positions = None if self._positions is None else self._positions[:, -1:] + 1
        if self._mask is not None:
            self._mask = torch.cat([self._mask, torch.ones_like(new)], -1)
        if self._cache is not None:
            self._unread, self._positions = new, positions
            return
        self._unread = torch.cat([self._unread, new], -1)  # a model without a cache reads everything again
        if self._positions is not None and positions is not None:
            self._positions = torch.cat([self._positions, positions], -1)


def _route(bank: "Bank | None", adapters: "RouteEntry | Sequence[RouteEntry]") -> AbstractContextManager[object]:
    return nullcontext() if bank is None and adapters is None else _present(bank).route(adapters)


def _present(bank: "Bank | None") -> "Bank":
    if bank is None:
        raise RouteError("adapters are given, but no bank that holds them", python="Give the bank, or adapters=None.")
    return bank


def answer_length(base: Base, rows: Sequence[Sequence[int]], max_new_tokens: int) -> int:
    """Return the number of tokens to generate: `max_new_tokens`, or fewer if the context has room for fewer.

    Raises:
        ConfigError: `max_new_tokens` is below 1, or a row leaves no room in the context.
    """
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}", hint="Give 1 or more.")
    if base.context is None:
        return max_new_tokens
    longest = max(map(len, rows))
    if longest >= base.context:
        raise ConfigError(
            f"a prompt of {longest} tokens leaves no room in the context of {base.name}, {base.context} tokens",
            hint="Shorten the prompt, or take a base with a longer context.",
        )
    return min(max_new_tokens, base.context - longest)
