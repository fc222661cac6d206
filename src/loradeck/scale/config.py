"""How many replicas serve, and where. Light to import: the command line reads its flags from it."""

from dataclasses import dataclass

from loradeck.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleConfig:
    """The replicas of a server on Ray.

    Raises:
        ConfigError: a number is out of its bounds.
    """

    replicas: int = 2
    """Replicas, each with the base and an engine of its own; with max_replicas, the least of them."""
    max_replicas: int | None = None
    """Add replicas up to this number while requests wait, and remove idle ones; by default there are always as many."""
    replica_cpus: float = 1.0
    """CPUs that Ray reserves for a replica, which computes with so many threads."""
    replica_gpus: float = 0.0
    """GPUs that Ray reserves for a replica."""
    replica_requests: int = 32
    """Requests at a replica, running and waiting; where an adapter's replica has as many, the least loaded takes it."""
    ray_address: str | None = None
    """A Ray cluster to join, as host:port or ray://host:port; by default RAY_ADDRESS, or a cluster started here."""

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be {what}, not {getattr(self, name)!r}"
            for name, valid, what in (
                ("replicas", self.replicas >= 1, "at least 1"),
                ("max_replicas", (self.max_replicas or self.replicas) >= self.replicas, "at least as many as replicas"),
                ("replica_cpus", self.replica_cpus > 0, "above 0"),
                ("replica_gpus", self.replica_gpus >= 0, "at least 0"),
                ("replica_requests", self.replica_requests >= 1, "at least 1"),
            )
            if not valid
        ]
        if problems:
            raise ConfigError("invalid settings of the replicas", problems)
