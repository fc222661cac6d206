"""The limits of an engine: memory, rows, waiting."""

from dataclasses import dataclass, fields
from typing import get_args

from loradeck.errors import ConfigError
from loradeck.runner.activations import Activations
from loradeck.runner.speculation import MAX_DRAFTS


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Nothing is reserved: memory is taken when it is needed, up to these limits.

    Raises:
        ConfigError: a setting is out of its bounds, or max_step_tokens is below max_rows.
    """

    max_rows: int = 16
    """Maximum number of requests computed in one step."""
    max_step_tokens: int = 256
    """Maximum number of tokens computed in one step. Longer prompts are read in chunks while running requests go on."""
    kv_cache_bytes: int = 1 << 30
    """Bytes for keys and values, including those kept for prefixes."""
    adapter_bytes: int = 1 << 30
    """Bytes for adapters on the device that computes."""
    memory_bytes: int = 1 << 32
    """Bytes for adapters evicted from the device and kept in memory; unused if the device is the CPU."""
    max_waiting: int = 1024
    """Maximum number of waiting requests; more are rejected with `BusyError` (HTTP 429)."""
    patience: float = 2.0
    """Seconds that a request waits while others, whose adapters are resident, go first."""
    quantum: int = 256
    """Tokens that an adapter may take before the others' turn."""
    timeout: float = 600.0
    """Maximum number of seconds from a request's arrival to its end."""
    loaders: int = 2
    """Threads that load adapters."""
    num_speculative_tokens: int = MAX_DRAFTS
    """Maximum number of draft tokens of a row in one step; 0 turns speculative decoding off."""
    enforce_eager: bool = False
    """Compute steps by transformers' modules even where the compiled step can."""
    activations: Activations = "auto"
    """What quantised weights are multiplied with in the compiled step: int8, rounded to 8 bits, is faster; plain is
    exact; auto takes int8 on CPUs where that was measured to be faster."""
    hub: tuple[str, ...] = ()
    """Repositories of the Hugging Face hub whose adapters requests may name, as owner/*; downloaded on demand."""
    hub_bytes: int = 1 << 30
    """Maximum bytes of an adapter that is downloaded."""

    def __post_init__(self) -> None:
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.type in (int, float)}
        problems = [
            f"{name}={value!r}"
            for name, value in values.items()
            if not (value > 0 or (value == 0 and name == "num_speculative_tokens"))
        ]
        if problems:
            raise ConfigError(
                "invalid engine settings", problems, hint="Give values above 0; num_speculative_tokens may be 0."
            )
        if self.activations not in get_args(Activations):
            raise ConfigError(
                f"unknown activations {self.activations!r:.40}", hint=f"Give {', '.join(get_args(Activations))}."
            )
        if self.max_step_tokens < self.max_rows:
            raise ConfigError(
                f"max_step_tokens={self.max_step_tokens} is below max_rows={self.max_rows}",
                hint="A step computes at least one token of every row.",
            )
