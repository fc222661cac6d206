"""LoraConfig: the settings of an adapter, named as in PEFT."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, wraps
from typing import Any, TypeVar

from loradeck.errors import ConfigError, shorten
from loradeck.lora.patterns import PatternTable, literal_pattern, why_invalid
from loradeck.lora.unsupported import ORIGIN, REFUSED, WITHOUT_EFFECT

T = TypeVar("T")

MAX_RANK = 65_536
MAX_ALPHA = 1e9
PATH_LENGTH = 300


def _refuse_by_name(config: type[T]) -> type[T]:
    """Let a config's __init__ say which of PEFT's settings it does not support, where Python would raise a TypeError.

    A setting that is turned off, as bias="none" is, asks for nothing and is accepted.
    """
    init = vars(config)["__init__"]

    @wraps(init)
    def __init__(self: T, *values: Any, **settings: Any) -> None:  # noqa: N807
        problems = []
        for name in sorted(settings.keys() & (REFUSED.keys() | ORIGIN | WITHOUT_EFFECT)):
            value = settings.pop(name)
            is_set, what, _ = REFUSED.get(name, (bool, "", ""))
            if name in ORIGIN | WITHOUT_EFFECT:
                problems.append(f"{name}={shorten(value)} has no equivalent here")
            elif is_set(value):
                problems.append(f"{name}={shorten(value)} {what}")
        if problems:
            raise ConfigError("LoraConfig does not support all of PEFT's settings", problems, hint="Leave these out.")
        init(self, *values, **settings)

    type.__setattr__(config, "__init__", __init__)
    return config


@_refuse_by_name
@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The settings of one adapter: y += scaling · B (A x), scaling = lora_alpha / r.

    Names and meanings are PEFT's (peft.LoraConfig).

    Raises:
        ConfigError: with every invalid value, or with every setting of PEFT's that is not supported.
    """

    r: int = 16
    """Rank: the size of the bottleneck between A (r, in) and B (out, r)."""
    lora_alpha: float = 32
    """Scales the update by lora_alpha / r, so that the learning rate need not follow the rank."""
    lora_dropout: float = 0.0
    """The probability that an input of A is dropped in training."""
    target_modules: str | Sequence[str] = "all-linear"
    """Path suffixes, one regex for whole paths, "all-linear" (all but the output head) or "attention"."""
    exclude_modules: str | Sequence[str] = ()
    """Path suffixes, or one regex, excluded from the targets."""
    layers_to_transform: int | Sequence[int] | None = None
    """Only these layers, by index, as in `model.layers.3.…`."""
    layers_pattern: str | Sequence[str] = ()
    """Names of the list of layers, if the first number in a path is not the layer's index."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) (rank-stabilised LoRA, arXiv:2312.03732)."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Ranks of single modules: a regex for the end of a path -> r; the first match applies."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """The same for lora_alpha."""
    modules_to_save: Sequence[str] = ()
    """Modules that the adapter replaces by its own, by the ends of their paths: the head of a classifier."""

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
            value = getattr(self, name)
            if name == "modules_to_save" and value is None:  # as PEFT has it
                object.__setattr__(self, name, ())
            elif isinstance(value, Iterable) and not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))
        if isinstance(self.layers_to_transform, Sequence):
            object.__setattr__(self, "layers_to_transform", tuple(self.layers_to_transform))
        problems = self._problems()
        if problems:
            raise ConfigError(
                "invalid LoraConfig", problems, python="See help(LoraConfig).", cli="See `loradeck train --help`."
            )

    def _problems(self) -> list[str]:
        problems = self._wrong_types()
        if problems:
            return problems
        for name, r in {"r": self.r, **{f"rank_pattern[{k!r}]": v for k, v in self.rank_pattern.items()}}.items():
            if isinstance(r, bool) or not isinstance(r, int) or not 1 <= r <= MAX_RANK:
                problems.append(f"{name} is {shorten(r)}, not an integer from 1 to {MAX_RANK}")
        alphas = {"lora_alpha": self.lora_alpha, **{f"alpha_pattern[{k!r}]": v for k, v in self.alpha_pattern.items()}}
        for name, alpha in alphas.items():
            # Not math.isfinite: it raises on an integer beyond a float's range.
            if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) <= MAX_ALPHA:
                problems.append(f"{name} is {shorten(alpha)}, not a number up to 1e9")
        if not 0 <= self.lora_dropout < 1:
            problems.append(f"lora_dropout is {shorten(self.lora_dropout)}, not a number p with 0 <= p < 1")
        if not self.target_modules:
            problems.append("target_modules is empty")
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str) and value not in ("all-linear", "attention"):
                problems += _invalid(name, [value])
        for name in ("rank_pattern", "alpha_pattern"):
            problems += _invalid(name, getattr(self, name))
        return problems

    def _wrong_types(self) -> list[str]:
        problems = []
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            value = getattr(self, name)
            if not isinstance(value, (str, tuple)) or not all(isinstance(part, str) for part in value):
                problems.append(f"{name} is {shorten(value)}, not a string or a list of strings")
        saved = self.modules_to_save
        if not isinstance(saved, tuple) or not all(isinstance(part, str) and part for part in saved):
            problems.append(f"modules_to_save is {shorten(saved)}, not a list of strings")
        layers = self.layers_to_transform
        if layers is not None and not all(type(n) is int for n in (layers if isinstance(layers, tuple) else (layers,))):
            problems.append(f"layers_to_transform is {shorten(layers)}, not an integer or a list of integers")
        if not isinstance(self.lora_dropout, int | float) or isinstance(self.lora_dropout, bool):
            problems.append(f"lora_dropout is {shorten(self.lora_dropout)}, not a number")
        if not isinstance(self.use_rslora, bool):
            problems.append(f"use_rslora is {shorten(self.use_rslora)}, not True or False")
        for name in ("rank_pattern", "alpha_pattern"):
            value = getattr(self, name)
            if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
                problems.append(f"{name} is {shorten(value)}, not a mapping from patterns to numbers")
        return problems

    def of_modules(
        self, ranks: Mapping[str, int], targets: str | Sequence[str], paths: Mapping[str, str] | None = None
    ) -> "LoraConfig":
        """Return the same settings for exactly these modules (path -> rank), which `targets` match.

        `paths` are the new paths of those that move.
        """
        paths = paths or {}
        alphas = {paths.get(path, path): alpha for path in ranks if (alpha := self.alpha(path)) != self.lora_alpha}
        ranks = {paths.get(path, path): r for path, r in ranks.items() if r != self.r}
        return replace(
            self,
            target_modules=targets,
            exclude_modules=(),
            layers_to_transform=None,
            layers_pattern=(),
            rank_pattern=literal_pattern(ranks),
            alpha_pattern=literal_pattern(alphas),
        )

    def saved_module(self, path: str) -> tuple[str, str] | None:
        """Return the module that modules_to_save names, and the name in it, of the parameter at a path; None if none.

        A name stands for all paths that end with it, as in PEFT: `norm` for input_layernorm too. Of nested modules the
        outer one counts: `classifier` for classifier.dense.weight.
        """
        parts = path.split(".")
        for end in range(1, len(parts)):
            module = ".".join(parts[:end])
            if module.endswith(tuple(self.modules_to_save)):
                return module, ".".join(parts[end:])
        return None

    def rank(self, path: str) -> int:
        """Return r of the module at `path`."""
        return self._ranks.get(path, self.r)

    def alpha(self, path: str) -> float:
        """Return lora_alpha of the module at `path`."""
        return self._alphas.get(path, self.lora_alpha)

    def scaling(self, path: str, r: int | None = None) -> float:
        """Return the factor of B (A x) for the module at `path`; `r` defaults to its rank in this config."""
        r = self.rank(path) if r is None else r
        return self.alpha(path) / (math.sqrt(r) if self.use_rslora else r)

    @cached_property
    def _ranks(self) -> PatternTable[int]:
        return PatternTable("rank_pattern", self.rank_pattern)

    @cached_property
    def _alphas(self) -> PatternTable[float]:
        return PatternTable("alpha_pattern", self.alpha_pattern)


def _invalid(name: str, patterns: Iterable[str]) -> list[str]:
    reasons = {pattern: why_invalid(pattern) for pattern in patterns}
    return [f"{name} has an invalid regex {shorten(key)}: {reason}" for key, reason in reasons.items() if reason]
