"""The server's configuration. Light to import: the command line reads its flags from it."""

from dataclasses import dataclass, fields
from typing import Literal

from loradeck.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Limits of a server, besides those of its engine.

    Raises:
        ConfigError: a number is not positive.
    """

    max_body_bytes: int = 8 << 20
    """Maximum size of a request body."""
    max_adapter_upload_bytes: int = 4 << 30
    """Maximum size of an adapter that is uploaded, and of what a zip of it holds."""
    max_prompt: int = 1 << 20
    """Maximum number of tokens in a prompt; the base's context is a limit too."""
    max_output: int = 1 << 20
    """Maximum number of tokens in an answer; a request that asks for more gets this many."""
    default_max_tokens: int | None = None
    """Maximum number of tokens in a chat's answer if the request names none; by default, the rest of the context."""
    max_choices: int = 128
    """Maximum number of answers to one request: its prompts times `n`."""
    max_inputs: int = 2048
    """Maximum number of inputs to one request for classes, vectors or scores."""
    max_eval_rows: int = 4096
    """Maximum rows of an evaluation: its sequences and questions, times the adapters and the base."""
    ping: float = 15.0
    """Seconds of silence after which a stream sends a comment to keep the connection open."""
    drain: float = 30.0
    """Seconds that running requests have to finish when the server shuts down."""
    top_adapters: int = 100
    """Maximum number of adapters with metrics of their own; the others are counted together."""
    hosts: tuple[str, ...] = ()
    """Accepted Host headers besides localhost's when no keys are set (guards against DNS rebinding)."""
    origins: tuple[str, ...] = ()
    """Origins of the web pages that may use this server (CORS)."""
    log_format: Literal["text", "json"] = "text"
    """Format of the log, which goes to stderr: one line per event."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The least important events to log: debug adds tracebacks, warning leaves out successful and invalid requests."""

    def __post_init__(self) -> None:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        problems = [
            f"{name}={value!r}" for name, value in values.items() if isinstance(value, int | float) and not value > 0
        ]
        if problems:
            raise ConfigError("invalid server configuration", problems, hint="Give numbers above 0.")
