import gc
import os
import resource
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loradeck.dataset import token_file
from loradeck.dataset.example import Example, Preference
from loradeck.dataset.token_file import Sizes, StoredExamples, TokenFile
from loradeck.errors import DataError


@st.composite
def examples(draw: st.DrawFn) -> Example:
    pairs = draw(st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), min_size=1, max_size=8))
    tokens = [token for token, _ in pairs]
    return Example(tokens, [token if learned else -100 for token, learned in pairs], draw(st.booleans()))


def stored(items: list[Example] | list[Preference]) -> StoredExamples:
    file = TokenFile()
    for item in items:
        file.append(item)
    return file.examples(range(len(file)))


@given(
    st.lists(examples(), min_size=1, max_size=9) | st.lists(st.builds(Preference, examples(), examples()), min_size=1)
)
def test_examples_come_back_as_they_were(items: list[Example] | list[Preference]) -> None:
    read = stored(items)
    assert list(read) == items
    assert [read[index] for index in range(-len(items), len(items))] == items * 2
    assert Sizes.of(read) == Sizes.of(items)
    assert list(read[1:]) == items[1:]
    assert list(read[:1]) == items[:1]
    with pytest.raises(IndexError):
        read[len(items)]


def test_the_sizes_of_a_part_are_of_that_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_file, "ENTRIES", 3)
    items = [Example([1] * length, [1] * length, truncated=length > 7) for length in range(2, 12)]
    read = stored(items)
    assert Sizes.of(read[4:9]) == Sizes.of(items[4:9])
    assert len(stored(items)[:0]) == 0


def open_files(folder: Path) -> int:
    """How many files of a folder this process has open, also nameless ones; other threads may open others."""
    links = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            links.append(descriptor.readlink())
    return sum(folder in link.parents for link in links)


def test_it_leaves_no_file_and_no_open_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    read = stored([Example([1, 2], [-100, 2])] * 1000)
    assert open_files(tmp_path) == 2
    assert len(read) == 1000
    assert not list(tmp_path.iterdir())
    del read
    gc.collect()
    assert open_files(tmp_path) == 0


def test_a_full_disk_is_a_clear_error(tmp_path: Path) -> None:
    # The limit on a file's size stands for a full disk; it would stay in this process.
    program = """
import resource, signal
from loradeck.dataset.example import Example
from loradeck.dataset.token_file import TokenFile
from loradeck.errors import DataError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 21, 1 << 21))
file = TokenFile()
try:
    for _ in range(1 << 10):
        file.append(Example([1] * 1024, [1] * 1024))
    file.examples(range(1))
except DataError as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    assert "the tokens cannot be written to a temporary file: File too large" in result.stdout
    assert "Set TMPDIR to a folder with more space" in result.stdout
    assert not result.stderr


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(DataError, match="cannot be written to a temporary file"):
            TokenFile()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
