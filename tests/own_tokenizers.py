"""Tokenizers that other tools write beside an adapter: the tiny base's, with other ids, templates and ends."""

import json

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

SHOUTING = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}!{{ eos_token }}{% endfor %}[answer] "
PLAIN = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
SPECIALS = 3  # the tiny base's; they keep their ids


def with_other_ids(tokenizer: PreTrainedTokenizerFast, **settings: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose bytes have the ids in the opposite order."""
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = definition["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    order = tokens[:SPECIALS] + tokens[: SPECIALS - 1 : -1]
    definition["model"]["vocab"] = {token: index for index, token in enumerate(order)}
    return _fast(definition, tokenizer, **settings)


def with_eos(tokenizer: PreTrainedTokenizerFast, eos: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose answers end with a token that may be new."""
    return _fast(json.loads(tokenizer.backend_tokenizer.to_str()), tokenizer, eos_token=eos)


def _fast(definition: dict, tokenizer: PreTrainedTokenizerFast, **settings: str) -> PreTrainedTokenizerFast:
    names = ("bos_token", "eos_token", "pad_token", "chat_template")
    parts = {name: getattr(tokenizer, name) for name in names} | settings
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(definition)), **parts)
