import csv
import hashlib
import sys
from pathlib import Path

import datasets
import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from loradeck.dataset import source
from loradeck.dataset.source import find
from loradeck.errors import DataError

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


def test_json_under_data_and_json_lines_in_a_json_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"version": 1,\n"data":\n[{"a": 1}, {"a": 1},\n\n{"a":\n2}, {"a": 3}]}')
    assert [place for place, _ in read(path)] == ["a.json:3", "a.json:3", "a.json:5", "a.json:6"]
    path.write_bytes(b'{"a": 1}\n{"a": 2}\n')
    assert read(path) == [("a.json:1", {"a": 1}), ("a.json:2", {"a": 2})]
    path.write_bytes(b'[{"a": 1}')
    with pytest.raises(DataError, match="is not valid JSON"):
        read(path)


def test_cells_that_hold_lists_are_json(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('messages,labels,tools\n"[{""role"": ""user""}]",[1],\n[,positive,\n')
    assert read(path) == [
        ("a.csv:2", {"messages": [{"role": "user"}], "labels": [1], "tools": ""}),
        ("a.csv:3", "$.messages: invalid JSON: Input data was truncated"),
    ]


def test_a_bad_row_does_not_hide_the_others(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbfprompt,completion\na,b,c\n\nd,e\n"f" x,g\nh,i\n')
    rows = read(path)
    assert rows[0][0] == "a.csv:2"
    assert "has 3 cells for 2 columns" in str(rows[0][1])
    assert rows[1] == ("a.csv:4", {"prompt": "d", "completion": "e"})
    assert rows[2][0] == "a.csv:5"
    assert "cannot be read from here on" in str(rows[2][1])
    assert len(rows) == 3
    path.write_text("a,a\n1,2\n")
    with pytest.raises(DataError, match="two columns of one name"):
        read(path)


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


def test_a_hub_dataset_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nobody/nothing is no file or folder here, and as a dataset of the hub it"):
        find("nobody/nothing:main")


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


def test_sizes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "LINE_BYTES", 50)
    long = [{"text": "a" * 1000}, {"text": "b"}]
    for name in ("a.jsonl", "a.json", "a.csv", "a.parquet"):
        (_, problem), (_, row) = read(write(tmp_path / name, long))
        assert problem == "$: has more than 50 bytes; split it into several records"
        assert row == {"text": "b"}
    monkeypatch.setattr(source, "DATASET_BYTES", 900)
    with pytest.raises(DataError, match=r"a.jsonl has [\d,]+ bytes, more than 900"):
        find(tmp_path / "a.jsonl")
    small = write(tmp_path / "small.parquet", [{"text": "a" * 40}] * 40)
    monkeypatch.setattr(source, "DATASET_BYTES", small.stat().st_size)
    with pytest.raises(DataError, match="as JSON"):
        read(small)
