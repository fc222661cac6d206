"""Rendezvous hashing: each adapter has an order of all replicas of its own."""

from collections.abc import Sequence
from hashlib import blake2b


def home_of(adapter: str, replicas: Sequence[str]) -> str:
    """Return which of these replicas an adapter stays at."""
    return max(replicas, key=lambda replica: blake2b(f"{adapter} {replica}".encode(), digest_size=8).digest())
