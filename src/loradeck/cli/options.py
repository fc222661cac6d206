"""Options that several verbs share, each written once: field or alias = flag = help line. Knows no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from cyclopts import Parameter

AsJson: TypeAlias = Annotated[bool, Parameter(name="--json", help="Print JSON, and nothing else.")]
Dtype: TypeAlias = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    Parameter(help="The base's numbers; auto is bfloat16 where the device computes in it, else float32."),
]
Weights: TypeAlias = Annotated[
    Literal["plain", "packed", "int8"],
    Parameter(
        help="How the base's weights are kept: as they came; packed for the CPU's fastest kernels; or in 8 bits, "
        "half of bfloat16's memory and quicker for few rows, a little off."
    ),
]
Adapters: TypeAlias = Annotated[
    Sequence[str],
    Parameter(name=["--adapter", "-a"], metavar="ADAPTER", show_default=False, help="May be given several times."),
]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen: the arguments of loradeck.generation."""

    max_new_tokens: int = 128
    """Tokens of an answer, at most."""
    temperature: float = 0.0
    """0 takes the likeliest token each time; above it, chance has a say."""
    top_p: float = 1.0
    """Above temperature 0: choose among the likeliest tokens that add up to this share."""
    seed: int | None = None
    """Makes chance repeatable."""
