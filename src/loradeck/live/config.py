"""The settings of a server that trains."""

from dataclasses import dataclass, fields

from loradeck.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LiveConfig:
    """How training shares an engine's thread with requests, and its limits.

    Raises:
        ConfigError: a setting is out of its bounds.
    """

    train_share: float = 0.5
    """Share of the time that training computes while requests do; without requests, it has all."""
    train_slice: float = 20.0
    """Milliseconds that training computes at once while requests wait for their next step. A piece is never cut: that
    is a layer's product, for a micro-batch."""
    train_tokens: int = 1024
    """Tokens in one forward pass of training; a larger step is split, to the same gradient. With fewer, pieces are
    shorter."""
    train_bytes: int = 1 << 30
    """Bytes for the adapters, gradients and optimizers of the jobs that train at once; the others wait."""
    max_file_bytes: int = 512 << 20
    """Maximum size of an uploaded file, also once it is decompressed."""
    checkpoint_every: int = 50
    """Steps between checkpoints, from which a job goes on after a crash."""

    def __post_init__(self) -> None:
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.type in (int, float)}
        problems = [f"{name}={value!r}" for name, value in values.items() if not value > 0]
        if problems:
            raise ConfigError("invalid settings of live training", problems, hint="Give values above 0.")
        if self.train_share > 1:
            raise ConfigError(f"train_share={self.train_share!r} is above 1", hint="Give a share, such as 0.5.")
