"""What an adapter is made of, in PEFT's words. Knows numbers and patterns; knows no tensors and no files."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Generic, TypeVar

from loradeck.errors import ConfigError

T = TypeVar("T")

MAX_RANK = 65_536
PATH_LENGTH, PATTERN_LENGTH, TARGET_LENGTH = 300, 512, 16_384
MATCH_STEPS = 20_000_000  # of a pattern on the longest path: less than a second


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The recipe of one adapter: y += scaling · B (A x), scaling = lora_alpha / r.

    Names and meanings are PEFT's (peft.LoraConfig).

    Raises:
        ConfigError: a value that cannot be.
    """

    r: int = 16
    """Rank: the size of the bottleneck between A (r, in) and B (out, r)."""
    lora_alpha: float = 32
    """Scales the update by lora_alpha / r, so that the learning rate need not follow the rank."""
    lora_dropout: float = 0.0
    """Share of A's inputs dropped while training."""
    target_modules: str | Sequence[str] = "all-linear"
    """Path suffixes, one regex for whole paths, "all-linear" (all but the output head) or "attention"."""
    exclude_modules: str | Sequence[str] = ()
    """Path suffixes, or one regex, taken out of the targets."""
    layers_to_transform: int | Sequence[int] | None = None
    """Only these layer numbers, counted as in `model.layers.3.…`."""
    layers_pattern: str | Sequence[str] = ()
    """Names of the list of layers, where the first number in a path is not the layer's."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) (rank-stabilised LoRA, arXiv:2312.03732)."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Ranks of single modules: a regex for the end of a path -> r; the first match counts."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """The same for lora_alpha."""

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            value = getattr(self, name)
            if isinstance(value, Iterable) and not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))
        if isinstance(self.layers_to_transform, Sequence):
            object.__setattr__(self, "layers_to_transform", tuple(self.layers_to_transform))
        problems = self._problems()
        if problems:
            raise ConfigError("This LoraConfig cannot be", problems, hint="See `help(LoraConfig)` for each field.")

    def _problems(self) -> list[str]:
        problems = self._wrong_types()
        if problems:
            return problems
        for name, r in {"r": self.r, **{f"rank_pattern[{k!r}]": v for k, v in self.rank_pattern.items()}}.items():
            if isinstance(r, bool) or not isinstance(r, int) or not 1 <= r <= MAX_RANK:
                problems.append(f"{name} is {_short(r)}, not a whole number from 1 to {MAX_RANK}")
        alphas = {"lora_alpha": self.lora_alpha, **{f"alpha_pattern[{k!r}]": v for k, v in self.alpha_pattern.items()}}
        for name, alpha in alphas.items():
            # The bound comes first: math.isfinite cannot take a whole number beyond a float's range.
            if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) <= 1e9:
                problems.append(f"{name} is {_short(alpha)}, not a number up to 1e9")
        if not 0 <= self.lora_dropout < 1:
            problems.append(f"lora_dropout is {_short(self.lora_dropout)}, not from 0 to below 1")
        if not self.target_modules:
            problems.append("target_modules is empty")
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str) and value not in ("all-linear", "attention"):
                problems += _regex_problems(name, value)
        for name in ("rank_pattern", "alpha_pattern"):
            for key in getattr(self, name):
                problems += _regex_problems(name, key) or _cost_problems(name, key)
        return problems

    def _wrong_types(self) -> list[str]:
        problems = []
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            value = getattr(self, name)
            if not isinstance(value, (str, tuple)) or not all(isinstance(part, str) for part in value):
                problems.append(f"{name} is {_short(value)}, not text or a list of texts")
        layers = self.layers_to_transform
        if layers is not None and not all(type(n) is int for n in (layers if isinstance(layers, tuple) else (layers,))):
            problems.append(f"layers_to_transform is {_short(layers)}, not a whole number or a list of them")
        if not isinstance(self.lora_dropout, int | float) or isinstance(self.lora_dropout, bool):
            problems.append(f"lora_dropout is {_short(self.lora_dropout)}, not a number")
        if not isinstance(self.use_rslora, bool):
            problems.append(f"use_rslora is {_short(self.use_rslora)}, not True or False")
        for name in ("rank_pattern", "alpha_pattern"):
            value = getattr(self, name)
            if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
                problems.append(f"{name} is {_short(value)}, not a table from patterns to numbers")
        return problems

    def of_modules(self, ranks: Mapping[str, int], targets: str | Sequence[str]) -> "LoraConfig":
        """Return the same recipe for exactly these modules (path -> rank), which `targets` match, spelled out."""
        alphas = {path: alpha for path in ranks if (alpha := self.alpha(path)) != self.lora_alpha}
        return replace(
            self,
            target_modules=targets,
            exclude_modules=(),
            layers_to_transform=None,
            layers_pattern=(),
            rank_pattern=literal_pattern({path: r for path, r in ranks.items() if r != self.r}),
            alpha_pattern=literal_pattern(alphas),
        )

    def rank(self, path: str) -> int:
        """Return r of the module at `path`."""
        return self._ranks(path, self.r)

    def alpha(self, path: str) -> float:
        """Return lora_alpha of the module at `path`."""
        return self._alphas(path, self.lora_alpha)

    def scaling(self, path: str, r: int | None = None) -> float:
        """Return the factor of B (A x) at the module at `path`, whose rank is `r` (by default its rank here)."""
        r = self.rank(path) if r is None else r
        return self.alpha(path) / (math.sqrt(r) if self.use_rslora else r)

    @cached_property
    def _ranks(self) -> "_Pattern[int]":
        return _Pattern(self.rank_pattern)

    @cached_property
    def _alphas(self) -> "_Pattern[float]":
        return _Pattern(self.alpha_pattern)


class _Pattern(Generic[T]):
    """PEFT's lookup: the first key k with re.match(rf"(.*\\.)?({k})$", path).

    Keys that are one whole literal path ("^" + re.escape(path), as this library writes them) are looked up directly.
    """

    def __init__(self, pattern: Mapping[str, T]) -> None:
        literal = {_literal(key): value for key, value in pattern.items()}
        self.literal: dict[str, T] | None = None
        if None not in literal:
            self.literal = {key: value for key, value in literal.items() if key is not None}
        self.compiled = (
            []
            if self.literal is not None
            else [(re.compile(rf"(.*\.)?({key})$"), value) for key, value in pattern.items()]
        )

    def __call__(self, path: str, default: T) -> T:
        if self.literal is not None:
            return self.literal.get(path, default)
        return next((value for key, value in self.compiled if key.match(path)), default)


def literal_pattern(values: Mapping[str, T]) -> dict[str, T]:
    """Return a rank_pattern or alpha_pattern for whole paths. No two keys match one path, so their order is free."""
    return {"^" + re.escape(path): value for path, value in sorted(values.items())}


def _literal(key: str) -> str | None:
    """Return the path that a key "^" + re.escape(path) stands for, None for any other key."""
    path = re.sub(r"\\(.)", r"\1", key[1:])
    return path if key == "^" + re.escape(path) else None


def _regex_problems(name: str, pattern: str) -> list[str]:
    try:
        if len(pattern) > TARGET_LENGTH:
            raise OverflowError(f"{len(pattern)} characters are more than {TARGET_LENGTH}")
        re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, RecursionError, OverflowError) as error:
        return [f"{name} has {_short(pattern)}, which is no regex ({error})"]
    return []


def _cost_problems(name: str, pattern: str) -> list[str]:
    """Find what could make a regex slow without bound: files come from strangers, and each path is held against it."""
    bare = re.sub(r"\\\D|\[\^?\]?(?:\\.|[^\]\\])*\]", "x", pattern, flags=re.DOTALL)
    cause = ""
    if len(pattern) > PATTERN_LENGTH:
        cause = f"is longer than {PATTERN_LENGTH} characters"
    elif re.search(r"\)[*+{]|\(\?[^:]|\\", bare):
        cause = "repeats a group, looks around or refers back"
    else:
        repeats = len(re.findall(r"[*+{]|(?<![*+}(])\?", bare))
        groups = max(bare.count("("), 1)
        choices = (bare.count("|") / groups + 1) ** groups  # at most: all alternatives of one group with all of another
        if math.comb(PATH_LENGTH, repeats + 1) * choices > MATCH_STEPS:
            cause = "repeats or chooses too often"
    return [f"{name} has {_short(pattern)}, which {cause}: it could take for ever"] if cause else []


def _short(value: object) -> str:
    if isinstance(value, int) and abs(value) > 10**12:
        return "a whole number beyond 10^12"  # printing it could itself take for ever
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "…"
