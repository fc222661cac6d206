import csv
import gzip
import hashlib
import sys
from importlib import import_module
from pathlib import Path

import datasets
import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from loradeck.dataset import json_file, source
from loradeck.dataset.source import find
from loradeck.dataset.text_file import ZSTD_MODULE
from loradeck.errors import DataError

zstd = import_module(ZSTD_MODULE)

ROWS = [{"prompt": "Hi", "completion": 'Ahoy,\n"matey"'}, {"prompt": "Bye", "completion": "Fair winds"}]


def read(path: Path | str, split: source.Split = "train") -> list[tuple[str, object]]:
    rows = find(path).rows[split]
    return [
        (row.location, row.content.message if isinstance(row.content, DataError) else msgspec.json.decode(row.content))
        for row in rows
    ]


def write(path: Path, rows: list[dict[str, object]] = ROWS) -> Path:
    """Write rows in the form that a file's name asks for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    match path.suffix:
        case ".jsonl" | ".ndjson":
            path.write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in rows))
        case ".json":
            path.write_bytes(msgspec.json.format(msgspec.json.encode(rows)))
        case ".csv" | ".tsv":
            with path.open("w", newline="") as file:
                table = csv.DictWriter(file, list(rows[0]), delimiter="," if path.suffix == ".csv" else "\t")
                table.writeheader()
                table.writerows(rows)
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("a.jsonl", ("a.jsonl:1", "a.jsonl:2")),
        ("a.ndjson", ("a.ndjson:1", "a.ndjson:2")),
        ("a.json", ("a.json:2", "a.json:6")),
        ("a.csv", ("a.csv:2", "a.csv:3")),
        ("a.tsv", ("a.tsv:2", "a.tsv:3")),
        ("a.parquet", ("a.parquet:1", "a.parquet:2")),
        ("A.PARQUET", None),
    ],
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str, places: tuple[str, str] | None) -> None:
    path = write(tmp_path / name.lower()).rename(tmp_path / name)
    rows = read(path)
    assert [row for _, row in rows] == ROWS
    assert places is None or tuple(place for place, _ in rows) == places
    assert find(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_what_arrow_fills_in_is_taken_out(tmp_path: Path) -> None:
    turns = [{"arguments": {"city": "Rome"}}, {"arguments": {"n": 1}}]
    path = write(tmp_path / "a.parquet", [{"messages": turns, "tools": None}, {"messages": turns, "tools": "[]"}])
    assert [row for _, row in read(path)] == [{"messages": turns}, {"messages": turns, "tools": "[]"}]


def test_a_folder_has_splits(tmp_path: Path) -> None:
    for name in ("train.jsonl", "dev.csv", "test.parquet", "more.jsonl", "README.md"):
        write(tmp_path / name)
    found = find(tmp_path)
    assert list(found.rows) == ["train", "valid", "test"]
    assert [place for place, _ in read(tmp_path, "valid")] == ["dev.csv:2", "dev.csv:3"]
    files = [tmp_path / name for name in ("train.jsonl", "dev.csv", "test.parquet")]
    assert found.sha256 == hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@pytest.mark.parametrize("name", ["valid", "validation", "val", "dev", "eval"])
def test_validation_has_many_names(tmp_path: Path, name: str) -> None:
    write(tmp_path / "train.jsonl")
    write(tmp_path / f"{name}.json")
    assert list(find(tmp_path).rows) == ["train", "valid"]


def test_shards_as_repositories_of_the_hub_have_them(tmp_path: Path) -> None:
    for at in (1, 0):
        write(tmp_path / "data" / f"train-0000{at}-of-00002.parquet", [{"text": f"{at}"}])
    write(tmp_path / "data" / "test-00000-of-00001-0a1b2c.parquet")
    assert [row for _, row in read(tmp_path)] == [{"text": "0"}, {"text": "1"}]
    assert list(find(tmp_path).rows) == ["train", "test"]
    (tmp_path / "data" / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(DataError, match="has 1 of 00002 files like train-00000"):
        find(tmp_path)


def test_what_save_to_disk_wrote(tmp_path: Path) -> None:
    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(tmp_path / "one")
    assert [row for _, row in read(tmp_path / "one")] == ROWS
    datasets.DatasetDict({"train": whole, "validation": whole, "other": whole}).save_to_disk(tmp_path / "two")
    found = find(tmp_path / "two")
    assert list(found.rows) == ["train", "valid"]
    assert read(tmp_path / "two", "valid")[0] == ("two/validation:1", ROWS[0])
    assert found.sha256 == find(tmp_path / "two").sha256 != find(tmp_path / "one").sha256
    (tmp_path / "two" / "dataset_dict.json").write_text("{")
    with pytest.raises(DataError, match="two cannot be loaded"):
        find(tmp_path / "two")


def test_a_name_within_a_folder_that_is_here_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data" / "mine.jsonl")
    with pytest.raises(DataError, match="data/nope cannot be read: no such file or folder") as caught:
        find("data/nope")
    assert "hub" not in caught.value.message


@pytest.mark.parametrize("name", ["./nowhere/data", "../nowhere/data", "~/nowhere/data", Path("nowhere/data")])
def test_an_explicit_path_is_no_hub_id(name: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        find(name)
    assert "hub" not in caught.value.message


def test_a_hub_that_does_not_answer_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    tries: list[object] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *name: tries.append(name))
    with pytest.raises(DataError, match=r"no such file or folder: nobody/nothing; .* does not answer") as caught:
        find("nobody/nothing")
    assert not tries
    assert "$HF_HUB_OFFLINE" in caught.value.hint


def test_a_hub_dataset_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match="no such file or folder: nobody/nothing; as a dataset of the hub it cannot be loaded"
    ):
        find("nobody/nothing:main")


def test_text_files_may_be_compressed(tmp_path: Path) -> None:
    for name in ("train.jsonl", "valid.json", "test.csv"):
        plain = write(tmp_path / name)
        pack, suffix = (gzip.compress, ".gz") if name != "valid.json" else (zstd.compress, ".zst")
        (tmp_path / f"{name}{suffix}").write_bytes(pack(plain.read_bytes()))
        plain.unlink()
    found = find(tmp_path)
    assert {split: [msgspec.json.decode(row.content) for row in rows] for split, rows in found.rows.items()} == {
        "train": ROWS, "valid": ROWS, "test": ROWS
    }  # fmt: skip
    assert read(tmp_path, "valid")[1][0] == "valid.json.zst:6"
    assert found.sha256 == hashlib.sha256(b"".join(file.read_bytes() for file in found.files)).hexdigest()
    write(tmp_path / "train.jsonl")
    with pytest.raises(DataError, match=r"train.jsonl and train.jsonl.gz could both be the train split"):
        find(tmp_path)


def test_how_far_it_was_read(tmp_path: Path) -> None:
    for name in ("train.jsonl", "valid.parquet", "test.csv"):
        write(tmp_path / name)
    found = find(tmp_path)
    assert (found.position.done, found.position.total) == (0, sum(file.stat().st_size for file in found.files))
    done = [found.position.done for rows in found.rows.values() for _ in rows]
    assert done == sorted(done)
    assert found.position.done == found.position.total


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.json", "a.parquet"])
def test_how_much_there_is_once_it_is_decompressed(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name)
    size = path.stat().st_size
    if name != "a.parquet":
        path = tmp_path / f"{name}.gz"
        path.write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    sizes: list[int] = []
    found = find(path, on_read=lambda position: sizes.append(position.size))
    [*found.rows["train"]]
    assert sizes == sorted(sizes)
    if name == "a.parquet":
        assert sizes[-1] >= sum(len(text) for row in ROWS for text in row.values())
    else:
        assert sizes[-1] == size


@pytest.mark.parametrize("name", ["a.parquet", "saved", "owner/name"])
def test_without_the_extra_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    write(tmp_path / "a.parquet")
    write(tmp_path / "saved" / "dataset_dict.json")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match="needs the package datasets") as caught:
        read(name)
    assert "pip install 'loradeck[datasets]'" in caught.value.hint


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ((), "has no train split and no other data"),
        (("valid.jsonl", "mine.csv"), r"has no train split; it has mine.csv, valid.jsonl"),
        (("train.jsonl", "train.csv"), "train.csv and train.jsonl could both be the train split"),
        (("train.jsonl", "valid.jsonl", "dev.jsonl"), "dev.jsonl and valid.jsonl could both be the valid split"),
    ],
)
def test_a_folder_without_clear_splits_is_refused(tmp_path: Path, names: tuple[str, ...], said: str) -> None:
    for name in names:
        write(tmp_path / name)
    with pytest.raises(DataError, match=said):
        find(tmp_path)


def test_a_missing_file_or_one_of_another_kind_is_refused(tmp_path: Path) -> None:
    for name in ("missing.jsonl", "missing", "a/b/c"):
        with pytest.raises(DataError, match="cannot be read: no such file or folder"):
            find(tmp_path / name)
    (tmp_path / "a.txt").write_text("Once")
    with pytest.raises(DataError, match=r"a.txt is none of .jsonl"):
        find(tmp_path / "a.txt")
    (tmp_path / "a.parquet").write_text("Once")
    with pytest.raises(DataError, match="is not a Parquet file"):
        read(tmp_path / "a.parquet")


def test_the_size_of_a_record_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_file, "RECORD_BYTES", 50)
    long = [{"text": "a" * 1000}, {"text": "b"}]
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        (_, problem), (_, row) = read(write(tmp_path / name, long))
        assert problem == "$: has more than 50 bytes; split it into several records"
        assert row == {"text": "b"}
    # In an array nothing says where the next one begins.
    path = tmp_path / "a.json"
    path.write_text(f'[{{"text": "b"}},\n{{"text": "{"a" * (1 << 20)}')
    rows = iter(find(path).rows["train"])
    assert next(rows).content == b'{"text": "b"}'
    with pytest.raises(DataError, match=r"a.json:2: \$: has more than 50 bytes"):
        next(rows)


def test_records_on_one_line_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1}, {"a": 2},\n{"a": 3}, {"a": 4}, {"a": 5}]')
    [rows] = find(path).rows.values()
    assert [row.location for row in rows] == ["a.json:1", "a.json:1[1]", "a.json:2", "a.json:2[1]", "a.json:2[2]"]
