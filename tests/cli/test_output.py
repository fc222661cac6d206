"""What verbs write: where they can, and with the usual permissions."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loradeck.cli.output import check_writable
from loradeck.errors import ConfigError


@pytest.fixture
def umask() -> Iterator[int]:
    """A umask that differs from the usual one."""
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


def test_every_file_that_is_written_has_the_umask_s_permissions(
    run: Callable, tiny_folder: Path, adapters: Path, tmp_path: Path, umask: int
) -> None:
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 3)
    out = tmp_path / "out"
    for command in (
        ["train", tiny_folder, "data.jsonl", "-o", out / "run", "--max-steps", 1],
        ["merge", tiny_folder, "adapters/poet", "-o", out / "merged"],
        ["plot", out / "run", "-o", out / "plot.svg"],
    ):
        ran = run(*command)
        assert ran.code == 0, ran.err
    written = {path: path.stat().st_mode & 0o777 for path in out.rglob("*")}
    assert any(path.name == "model.safetensors" for path in written)
    assert {path: mode for path, mode in written.items() if mode != (0o777 if path.is_dir() else 0o666) & ~umask} == {}


def test_an_output_that_cannot_be_written_is_refused_before_the_base_is_looked_for(
    run: Callable, adapters: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    for command in (
        ["merge", "nowhere", "adapters/poet", "-o", "file/inside"],
        ["export", "adapters/poet", "--base", "nowhere", "-o", "file/poet.gguf"],
    ):
        ran = run(*command)
        assert ran.code == 2
        assert ran.err.startswith(f"loradeck: cannot write {command[-1]}: {tmp_path / 'file'}: Not a directory\n")


def test_an_output_in_new_folders_can_be_written(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b" / "c")
    assert [*tmp_path.iterdir()] == []
    with pytest.raises(ConfigError, match="cannot write"):
        check_writable(Path("/proc/self/new"))
