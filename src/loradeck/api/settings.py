"""What a server allows its clients, besides what its engine does. Knows numbers only."""

from dataclasses import dataclass, fields

from loradeck.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The bounds of a server."""

    max_body_bytes: int = 8 << 20
    """Of a request's body at most."""
    max_prompt: int = 1 << 20
    """Tokens of a prompt at most; the base's context bounds it too."""
    max_output: int = 1 << 20
    """Tokens of an answer at most; a request may ask for more, and gets so many."""
    max_choices: int = 128
    """Answers of one request at most: its prompts times `n`."""
    ping: float = 15.0
    """Seconds of silence after which a stream says that it is still there."""
    drain: float = 30.0
    """Seconds that running requests have to end once the server is told to."""
    top_adapters: int = 100
    """Adapters with metrics of their own at most; the others are counted together."""
    hosts: tuple[str, ...] = ("localhost", "127.0.0.1", "[::1]")
    """What a server without keys may be called in a request, lest a page in a browser reach it by a name of its own."""
    origins: tuple[str, ...] = ()
    """Origins of pages whose scripts may use this server (CORS)."""

    def __post_init__(self) -> None:
        wrong = [
            f"{own.name}={value!r}"
            for own in fields(self)
            if not isinstance(value := getattr(self, own.name), tuple) and not value > 0
        ]
        if wrong:
            raise ConfigError("a setting of the server is not above 0", wrong, hint="Give more than 0.")
