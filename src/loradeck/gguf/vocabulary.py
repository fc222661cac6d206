"""A tokenizer as llama.cpp reads it: tokens, merges or scores, special tokens, chat template.

llama.cpp knows two kinds of BPE: of bytes ("gpt2"), which splits a text first in a way that it must know by name, and
SentencePiece's ("llama"), which merges the pair with the highest score first.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from loradeck.base.text import stop_ids
from loradeck.errors import UnsupportedError

if TYPE_CHECKING:
    from gguf import GGUFWriter

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LETTERS = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = r"[^\r\n\p{{L}}\p{{N}}]?{0}*{1}+|[^\r\n\p{{L}}\p{{N}}]?{0}+{1}*".format(*LETTERS)
# How a text is split before BPE -> llama.cpp's name for it (llm_tokenizer_bpe in its src/llama-vocab.cpp).
SPLITS: dict[tuple[str, ...], str] = {
    ("gpt-2",): "gpt-2",
    ("digits", "gpt-2"): "smollm",
    (f"{CONTRACTIONS}|{WORDS}|\\p{{N}}{{1,3}}|{REST}",): "dbrx",
    (f"{CONTRACTIONS}|{WORDS}|\\p{{N}}|{REST}",): "qwen2",
    (TEKKEN + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",): "tekken",
}
IGNORES_MERGES = {"dbrx": "llama-bpe"}  # the same split by a vocabulary that takes whole words without their merges
BYTE = re.compile("<0x[0-9A-F]{2}>")
SPACE = "▁"


def add_vocabulary(
    writer: "GGUFWriter", tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig | None, size: int
) -> None:
    """Add a tokenizer to a file whose model has `size` tokens.

    Raises:
        UnsupportedError: llama.cpp has no such tokenizer.
    """
    definition = _definition(tokenizer)
    model = definition["model"]
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    tokens, types = _tokens(tokenizer, size, byte_fallback=model["byte_fallback"])
    if model["byte_fallback"]:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_scores(_scores(tokens, merges))
        writer.add_add_space_prefix(_prepends_space(definition))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_split_name(definition))
        writer.add_token_list(tokens)
        writer.add_token_merges([" ".join(part.replace(" ", "Ġ") for part in pair) for pair in merges])
    writer.add_token_types(types)
    _add_special_tokens(writer, tokenizer, generation, size)
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several, by name
        writer.add_chat_template([{"name": name, "template": text} for name, text in template.items()])
    elif template is not None:
        writer.add_chat_template(template)


def _definition(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    definition: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else {"model": {}}
    if definition["model"].get("type") != "BPE":
        kind = definition["model"].get("type", type(tokenizer).__name__)
        raise UnsupportedError(f"cannot export the tokenizer: it is {kind}, not BPE")
    if not definition["model"]["merges"]:
        raise UnsupportedError("cannot export the tokenizer: it has no merges, and llama.cpp needs some")
    return definition


def _tokens(tokenizer: PreTrainedTokenizerBase, size: int, *, byte_fallback: bool) -> tuple[list[str], list[int]]:
    """Return each token and its type; ids without a token get a name of their own, which no text contains."""
    from gguf import TokenType

    added = tokenizer.added_tokens_decoder
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    tokens: list[str] = []
    types: list[int] = []
    for number in range(size):
        token = by_id.get(number)
        if token is None:
            tokens.append(f"[PAD{number}]")
            types.append(TokenType.UNUSED)
            continue
        tokens.append(token)
        if byte_fallback and number == tokenizer.unk_token_id:
            types.append(TokenType.UNKNOWN)
        elif number in added:
            types.append(TokenType.CONTROL if added[number].special else TokenType.USER_DEFINED)
        elif byte_fallback and BYTE.fullmatch(token):
            types.append(TokenType.BYTE)
        else:
            types.append(TokenType.NORMAL)
    return tokens, types


def _scores(tokens: Sequence[str], merges: Sequence[Sequence[str]]) -> list[float]:
    """Return scores that merge in the order of the merges; SentencePiece's own are not in a tokenizer.json."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _prepends_space(definition: Mapping[str, Any]) -> bool:
    """Whether a space is put before a text."""
    for step in [*_steps(definition["normalizer"]), *_steps(definition["pre_tokenizer"])]:
        if step == {"type": "Prepend", "prepend": SPACE}:
            return True
        if step["type"] == "Metaspace":
            return step.get("prepend_scheme", "always") != "never"
    return False


def _split_name(definition: Mapping[str, Any]) -> str:
    """Return llama.cpp's name of the way in which a text is split.

    Raises:
        UnsupportedError: it has none, or none that is known here.
    """
    split: list[str] = []
    for step in _steps(definition["pre_tokenizer"]):
        match step:
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": regex}:
                split += ["gpt-2"] if regex else []
            case {"type": "Digits", "individual_digits": True}:
                split.append("digits")
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
                split.append(pattern)
            case _:
                split.append(str(step))
    name = SPLITS.get(tuple(split))
    if name is None:
        known = ", ".join([*SPLITS.values(), *IGNORES_MERGES.values()])
        raise UnsupportedError(
            f"cannot export the tokenizer: it splits texts by {' and '.join(split) or 'nothing'!r:.200}",
            hint=f"llama.cpp's ways to split that are known: {known}.",
        )
    return IGNORES_MERGES.get(name, name) if definition["model"].get("ignore_merges") else name


def _steps(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the steps of a normalizer or pre-tokenizer, which may be a sequence of them."""
    if step is None:
        return []
    if step["type"] != "Sequence":
        return [step]
    return [each for part in step.get("pretokenizers", step.get("normalizers", [])) for each in _steps(part)]


def _add_special_tokens(
    writer: "GGUFWriter", tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig | None, size: int
) -> None:
    ids = {kind: getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "unk", "pad")}
    others = sorted(stop_ids(tokenizer, generation) - {ids["eos"]})
    ids["eot"] = others[0] if others else None  # a turn also ends here
    for kind, number in ids.items():
        if number is not None and number < size:
            getattr(writer, f"add_{kind}_token_id")(number)
    text = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(bool(text) and text[0] == ids["bos"])
    writer.add_add_eos_token(len(text) > 1 and text[-1] == ids["eos"])
