"""Options that several verbs share, each written once: a dataclass field or alias is the flag and its help."""

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from cyclopts import Parameter

from loradeck.errors import ConfigError
from loradeck.serve import config

STDIN = "/dev/stdin"  # what a lone `-` on the command line becomes
TYPED: ContextVar[Sequence[str]] = ContextVar("TYPED", default=())
"""The arguments of the command, as they were typed."""


def is_typed(name: str) -> bool:
    """Return whether the flag of a setting was typed, be its value the default or not."""
    flag = "--" + name.strip("_").replace("_", "-")
    return any(token.partition("=")[0] == flag for token in TYPED.get())


def typed_without(flags: Mapping[str, int]) -> list[str]:
    """Return the typed arguments without some flags, each with its number of values."""
    arguments: list[str] = []
    tokens = iter(TYPED.get())
    for token in tokens:
        flag, equals, _ = token.partition("=")
        if flag not in flags:
            arguments.append(token)
        elif not equals:
            for _ in range(flags[flag]):
                next(tokens, None)
    return arguments


AsJson: TypeAlias = Annotated[bool, Parameter(name="--json", help="Print JSON and nothing else.")]
Yes: TypeAlias = Annotated[bool, Parameter(alias="-y", help="Do not ask.")]
Dtype: TypeAlias = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    Parameter(help="The base's dtype; auto is bfloat16 if the device computes in it, else float32."),
]
Weights: TypeAlias = Annotated[
    Literal["plain", "packed", "blocks", "int8", "int4"],
    Parameter(
        help="Format of the base's weights: plain; packed for torch's fastest kernels on a CPU; blocks for the "
        "compiled step; int8, half the memory of bfloat16, and int4, a third of it: faster for few rows, at an error."
    ),
]
Task: TypeAlias = Annotated[
    Literal["generate", "classify", "tokens", "reward"],
    Parameter(
        help="What the base is for: generate text; classify texts with a label each; tokens, words with a tag each; or "
        "reward, to score answers after preference pairs."
    ),
]
Activations: TypeAlias = Annotated[
    config.Activations,
    Parameter(
        help="What quantised weights are multiplied with: int8, rounded to 8 bits, is faster; plain is exact; auto "
        "takes int8 on CPUs where that was measured to be faster."
    ),
]
TrainingWeights: TypeAlias = Annotated[
    Literal["plain", "packed", "int8", "int4"],
    Parameter(
        help="Format of the base's weights: plain; packed for torch's fastest kernels on a CPU; or int8 or int4, which "
        "take about a half and a third of bfloat16's memory. A .gguf file stays as it is quantised unless --dtype is "
        "given.",
    ),
]
ServedTask: TypeAlias = Annotated[
    Literal["generate", "classify", "tokens", "reward", "embed"],
    Parameter(
        help="What the base is for: generate text; classify texts, or tokens; reward texts with a number; or embed "
        "them as vectors."
    ),
]
Adapters: TypeAlias = Annotated[
    Sequence[str],
    Parameter(name=["--adapter", "-a"], metavar="ADAPTER", show_default=False, help="Can be given several times."),
]
AnyBase: TypeAlias = Annotated[bool, Parameter(help="Accept adapters that were trained on another base.")]
System: TypeAlias = Annotated[
    str | None, Parameter(help="A system prompt, before every conversation that has none of its own.")
]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """The sampling arguments of loradeck.generation.

    Raises:
        ConfigError: `top_p` is given, and the temperature is 0.
    """

    max_new_tokens: int = 128
    """Maximum tokens of an answer."""
    temperature: float = 0.0
    """0 takes the most likely token each time; higher values sample more freely."""
    top_p: float = 1.0
    """Sample from the most likely tokens whose probabilities add up to this; needs a temperature above 0."""
    seed: int | None = None
    """Makes sampling reproducible."""

    def __post_init__(self) -> None:
        if self.temperature == 0 and self.top_p != type(self).top_p:
            raise ConfigError("--top-p needs a temperature above 0", hint="Add --temperature, such as 0.7.")
