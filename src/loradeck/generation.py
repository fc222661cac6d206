"""Text from prompts, each through its own adapter: one batch to its end, or one answer piece by piece.

Knows a base, a bank and transformers' generation. Knows no queue, no cache kept between calls, no training.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from typing import TYPE_CHECKING

import torch
from transformers import GenerationConfig, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from loradeck.base.load import Base
from loradeck.base.text import Detokenizer, Prompt, decode, encode, pad_left, stop_ids
from loradeck.errors import ConfigError, RouteError

if TYPE_CHECKING:
    from loradeck.lora.bank import Bank
    from loradeck.lora.routing import RouteEntry


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
) -> list[str]:
    """Return one completion per prompt, computed as one batch, without the token that ended its turn.

    A prompt is a string or a list of messages. `adapters` is one entry for the whole batch (a name, `{name: weight}`,
    or None for the base alone) or a list with one entry per prompt. A temperature of 0 takes the likeliest token;
    above it, `top_p` keeps the smallest set of tokens whose probabilities add up to it, and `seed` makes the
    choices repeatable and leaves torch's own generator as it was. An answer ends early at the base's context.

    Raises:
        ConfigError: no prompt, one that is empty or longer than the context, a number out of its range.
        RouteError: adapters that do not fit the prompts, or no bank that holds them.
        UnknownAdapterError: a name that is not resident.
    """
    if isinstance(prompts, str) or not prompts:
        raise ConfigError("prompts is not a list with at least one prompt", hint="Give a list: [prompt].")
    if isinstance(adapters, Sequence) and not isinstance(adapters, str) and len(adapters) != len(prompts):
        raise RouteError(
            f"{len(adapters)} adapters for {len(prompts)} prompts", hint="Give one entry per prompt, or one for all."
        )
    rows = [encode(base.tokenizer, prompt) for prompt in prompts]
    length = _length(base, rows, max_new_tokens)
    _check_sampling(temperature, top_p)
    stops = stop_ids(base.tokenizer, base.model.generation_config)
    pad = base.tokenizer.pad_token_id or 0  # masked, so any token will do
    settings = GenerationConfig(
        max_new_tokens=length,
        eos_token_id=sorted(stops) or None,
        pad_token_id=pad,
        # what is left None would come from the base's own settings, and a greedy run may only repeat the defaults
        do_sample=temperature > 0,
        temperature=float(temperature) or 1.0,
        top_p=top_p if temperature > 0 else 1.0,
        top_k=0 if temperature > 0 else 50,
        repetition_penalty=1.0,
    )
    device = base.model.device
    ids, mask = (each.to(device) for each in pad_left(rows, pad))
    cards = [device] if device.type == "cuda" else []
    with _route(bank, adapters), torch.random.fork_rng(cards, enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        output = base.model.generate(  # type: ignore[operator]
            input_ids=ids, attention_mask=mask, generation_config=settings
        )
    return [decode(base.tokenizer, _turn(row, stops)) for row in output[:, ids.shape[1] :].tolist()]


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
) -> Iterator[str]:
    """Yield one completion in pieces as they come; joined, they are what `generate` returns for the prompt alone.

    The model runs in the thread that iterates, one token at a time, and not at all once that stops. The arguments are
    checked before this returns; they and the errors are those of `generate`.
    """
    ids = encode(base.tokenizer, prompt)
    length = _length(base, [ids], max_new_tokens)
    _check_sampling(temperature, top_p)
    _route(bank, adapter)  # an adapter that is not there is heard of now, not at the first piece
    stops = stop_ids(base.tokenizer, base.model.generation_config)
    chance = torch.Generator(base.model.device)
    chance.manual_seed(seed) if seed is not None else chance.seed()
    sharpen = LogitsProcessorList()
    if temperature > 0:
        sharpen += [TemperatureLogitsWarper(float(temperature)), TopPLogitsWarper(top_p)]

    # transformers changed the word during version 5.
    word = "cache" if "cache" in signature(type(base.model).forward).parameters else "past_key_values"

    @torch.no_grad()
    def pieces() -> Iterator[str]:
        text, cache = Detokenizer(base.tokenizer), None
        unread = prompt_ids = torch.tensor([ids], device=base.model.device)
        for _ in range(length):
            with _route(bank, adapter):  # not across a yield: there it would be the reader's route too
                output = base.model(input_ids=unread, use_cache=True, logits_to_keep=1, **{word: cache})
            cache = output[word]
            scores = sharpen(prompt_ids, output.logits[:, -1].float())  # type: ignore[arg-type]
            if temperature > 0:
                unread = torch.multinomial(scores.softmax(-1), 1, generator=chance)
            else:
                unread = scores.argmax(-1, keepdim=True)
            token = int(unread)
            if token in stops:
                return
            if piece := text.push(token):
                yield piece

    return pieces()


def _route(bank: "Bank | None", adapters: "RouteEntry | Sequence[RouteEntry]") -> AbstractContextManager[object]:
    if bank is not None:
        return bank.route(adapters)
    if adapters is not None:
        raise RouteError("adapters are given, but no bank that holds them", hint="Give the bank, or adapters=None.")
    return nullcontext()


def _length(base: Base, rows: Sequence[Sequence[int]], max_new_tokens: int) -> int:
    """The tokens to generate: as many as asked for, fewer where the longest prompt leaves less of the context."""
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


def _check_sampling(temperature: float, top_p: float) -> None:
    if not 0 <= temperature < float("inf"):
        raise ConfigError(f"temperature is {temperature}", hint="Give 0 for the likeliest token, or more.")
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p is {top_p}", hint="Give a probability above 0, at most 1.")


def _turn(ids: list[int], stops: frozenset[int]) -> list[int]:
    """The ids before the first that ends the turn."""
    return next((ids[:at] for at, token in enumerate(ids) if token in stops), ids)
