"""A job's folder: what it keeps, under which names, and what is removed."""

from pathlib import Path

import pytest

from loradeck.live.job_folder import TRAINING, JobFolder


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("train.jsonl", "train.jsonl"),
        ("Train.JSONL", "Train.JSONL"),
        ("table.csv.gz", "table.csv.gz"),
        ("content", "content.jsonl"),
        ("notes.txt", "notes.txt.jsonl"),
        ("a/../b.json", "a-..-b.json"),
        (".jsonl", "adapter.jsonl"),
        ("..", "adapter.jsonl"),
        ("é" * 150 + ".csv", "é" * 60 + ".csv"),
        ("🦜" * 150, "🦜" * 60 + ".jsonl"),
    ],
)
def test_files_keep_their_names_and_what_they_say(tmp_path: Path, given: str, kept: str) -> None:
    content = tmp_path / "content"
    content.write_bytes(b"{}")
    folder = JobFolder(tmp_path / "job")
    folder.take_file(TRAINING, content, given)
    taken = folder.taken(TRAINING)
    assert taken == tmp_path / "job" / TRAINING / kept
    assert taken.samefile(content)
    content.unlink()
    assert taken.read_bytes() == b"{}"
    folder.take_file(TRAINING, content, "another.jsonl")
    assert folder.taken(TRAINING) == taken, "it is there already"


def test_half_written_things_are_removed(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path / "job")
    for name in (".model.x", "models/.3.y", "checkpoints/.00000001.z", "models/3", "checkpoints/00000001"):
        (folder.path / name).mkdir(parents=True)
    (folder.path / ".run.toml.a").touch()
    folder.sweep()
    left = sorted(str(path.relative_to(folder.path)) for path in folder.path.rglob("*"))
    assert left == ["checkpoints", "checkpoints/00000001", "models", "models/3"]
    folder.free()
    assert [path.name for path in folder.path.iterdir()] == ["models"]
