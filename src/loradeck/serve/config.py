"""What an engine may use: memory, rows, waiting. Knows numbers only."""

from dataclasses import dataclass, fields

from loradeck.errors import ConfigError


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """The bounds of an engine. Nothing is reserved: memory is taken when it is needed, up to these bytes."""

    max_rows: int = 16
    """Requests computed in one step at most."""
    max_step_tokens: int = 256
    """Tokens computed in one step at most; a longer prompt is read in chunks, beside the running streams."""
    kv_cache_bytes: int = 1 << 30
    """For keys and values, those kept for prefixes included."""
    adapter_bytes: int = 1 << 30
    """For adapters on the device that computes."""
    memory_bytes: int = 1 << 32
    """For adapters that gave way there and are kept in memory; not used where the device is the CPU."""
    max_waiting: int = 1024
    """Requests that wait at most; those beyond are refused with `BusyError`."""
    patience: float = 2.0
    """Seconds for which a request waits while others, whose adapters are resident, go first."""
    quantum: int = 256
    """Tokens that an adapter may take before it is another's turn."""
    timeout: float = 600.0
    """Seconds from a request's arrival to its end at most."""
    loaders: int = 2
    """Threads that load adapters."""

    def __post_init__(self) -> None:
        wrong = [f"{own.name}={getattr(self, own.name)!r}" for own in fields(self) if not getattr(self, own.name) > 0]
        if wrong:
            raise ConfigError("a setting of the engine is not above 0", wrong, hint="Give more than 0.")
        if self.max_step_tokens < self.max_rows:
            raise ConfigError(
                f"max_step_tokens={self.max_step_tokens} is below max_rows={self.max_rows}",
                hint="A step computes a token of every row at least.",
            )
