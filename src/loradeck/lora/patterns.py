"""Regexes for module paths, matched within a bound of time: files come from strangers."""

import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, TypeVar

from loradeck.errors import ConfigError, shorten

T = TypeVar("T")

SECONDS = 1.0  # of computing, for all paths together; usual patterns take milliseconds
LENGTH = 16_384  # characters of a pattern
REPEATS = re.compile(r"[*+?{|(]")  # without any of them a regex can match in one way only

Match = Callable[[str, float], object]


class Patterns:
    """Regexes that match whole paths; the first that does counts."""

    def __init__(self, name: str, patterns: Iterable[str], *, anywhere: bool = False) -> None:
        """`name` is the setting's, for errors. With `anywhere` a pattern may match the end of a path, after a dot."""
        self.name, self.patterns, self.anywhere = name, tuple(patterns), anywhere
        self._left = SECONDS
        self._compiled: dict[int, Match] = {}
        self._results: dict[str, int | None] = {}

    def first(self, path: str) -> int | None:
        """Return the index of the first pattern that matches a path, None if none does.

        Raises:
            ConfigError: matching takes too long, or a pattern is invalid.
        """
        if path not in self._results:
            self._results[path] = self._search(path)
        return self._results[path]

    def _search(self, path: str) -> int | None:
        end = time.thread_time() + self._left
        for index, pattern in enumerate(self.patterns):
            if index not in self._compiled:
                self._compiled[index] = self._compile(pattern)
            left = self._left = end - time.thread_time()
            try:
                matches = left > 0 and self._compiled[index](path, left)
                self._left = end - time.thread_time()
            except TimeoutError:
                matches, self._left = None, 0.0
            if self._left <= 0:
                raise ConfigError(
                    f"{self.name} has {shorten(pattern)}, which takes too long to match with the modules' paths",
                    hint="Write it without repeats of repeats, or list the modules.",
                )
            if matches:
                return index
        return None

    def _compile(self, pattern: str) -> Match:
        whole = rf"(.*\.)?({pattern})" if self.anywhere else pattern
        if not REPEATS.search(pattern):
            compiled = re.compile(whole)
            return lambda path, _: compiled.fullmatch(path)
        import regex  # only for some adapters, and it takes longer to import than an adapter to load

        try:
            limited: Any = regex.compile(whole, regex.VERSION0)  # as `re` reads it
        except (regex.error, RecursionError) as error:
            raise ConfigError(f"{self.name} has an invalid regex {shorten(pattern)}: {error}") from None
        return lambda path, seconds: limited.fullmatch(path, timeout=seconds, concurrent=True)


class PatternTable(Generic[T]):
    """PEFT's rank_pattern and alpha_pattern: the first key k with re.match(rf"(.*\\.)?({k})$", path).

    Keys that are one literal path ("^" + re.escape(path), as loradeck writes them) are looked up in a dict.
    """

    def __init__(self, name: str, table: Mapping[str, T]) -> None:
        literal = {_literal(key): value for key, value in table.items()}
        self.literal: dict[str, T] | None = None
        if None not in literal:
            self.literal = {key: value for key, value in literal.items() if key is not None}
        self.values = tuple(table.values())
        self.patterns = Patterns(name, table, anywhere=True)

    def get(self, path: str, default: T) -> T:
        """Return the value for a path.

        Raises:
            ConfigError: matching takes too long.
        """
        if self.literal is not None:
            return self.literal.get(path, default)
        index = self.patterns.first(path)
        return default if index is None else self.values[index]


def literal_pattern(values: Mapping[str, T]) -> dict[str, T]:
    """Return a rank_pattern or alpha_pattern for whole paths; no two keys match one path, so any order will do."""
    return {"^" + re.escape(path): value for path, value in sorted(values.items())}


def _literal(key: str) -> str | None:
    """Return the path of a key "^" + re.escape(path), None for any other key."""
    path = re.sub(r"\\(.)", r"\1", key[1:])
    return path if key == "^" + re.escape(path) else None


def why_invalid(pattern: str) -> str | None:
    """Return why a pattern is no regex, None if it is one."""
    try:
        if len(pattern) > LENGTH:
            raise OverflowError(f"{len(pattern)} characters are more than {LENGTH}")
        re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, RecursionError, OverflowError) as error:
        return str(error)
    return None
