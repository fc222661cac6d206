"""Where an adapter's own tokenizer and chat template differ from the base's, in words."""

from collections.abc import Iterator, Mapping, Sequence

from transformers import PreTrainedTokenizerBase

SHOWN = 3  # tokens of a list
LENGTH = 32  # characters of a token


def differences(own: PreTrainedTokenizerBase, base: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return what differs, by what it is: `vocabulary`, `splitting`, `special tokens`, `chat template`."""
    if own is base:
        return {}
    kinds = {
        "vocabulary": _vocabulary(own.get_vocab(), base.get_vocab()),
        "special tokens": "; ".join(_special_tokens(own.special_tokens_map, base.special_tokens_map)),
        "chat template": _template(own.chat_template, base.chat_template),
    }
    differences = {kind: text for kind, text in kinds.items() if text}
    return differences or {"splitting": "texts are split into tokens in another way"}


def _vocabulary(own: Mapping[str, int], base: Mapping[str, int]) -> str:
    more = sorted(own.keys() - base.keys(), key=own.__getitem__)
    fewer = sorted(base.keys() - own.keys(), key=base.__getitem__)
    moved = sorted((token for token in own.keys() & base.keys() if own[token] != base[token]), key=own.__getitem__)
    parts = {"more": more, "fewer": fewer, "with other ids": moved}
    return "; ".join(f"{len(tokens)} {how}: {_listed(tokens)}" for how, tokens in parts.items() if tokens)


def _special_tokens(own: Mapping[str, object], base: Mapping[str, object]) -> Iterator[str]:
    for name in sorted(own.keys() | base.keys()):
        mine, theirs = own.get(name), base.get(name)
        if str(mine) != str(theirs):
            yield f"{name.removesuffix('_token')} is {_short(mine)}, not {_short(theirs)}"


def _template(own: object, base: object) -> str:
    if own == base:
        return ""
    return "the base has none" if base is None else "another one"


def _listed(tokens: Sequence[str]) -> str:
    more = f" and {len(tokens) - SHOWN} others" if len(tokens) > SHOWN else ""
    return ", ".join(map(_short, tokens[:SHOWN])) + more


def _short(token: object) -> str:
    text = str(token)
    return text if len(text) <= LENGTH else f"{text[: LENGTH - 1]}…"
