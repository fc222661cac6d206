import json
from io import BufferedReader, BytesIO

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loradeck.dataset import json_file
from loradeck.errors import DataError

RECORDS = [{"text": 'a "b" [c {d', "n": [1, {"x": []}]}, {"text": "e\\"}, {"messages": [{"role": "user"}, {}]}]


def read(content: bytes | str) -> list[tuple[int, object]]:
    content = content.encode() if isinstance(content, str) else content
    rows = json_file.read(BufferedReader(BytesIO(content)), "a.json")
    return [(number, row.message if isinstance(row, DataError) else row) for number, row in rows]


def records(content: bytes | str) -> list[tuple[int, object]]:
    return [(number, msgspec.json.decode(row)) for number, row in read(content)]


def refused(content: str) -> tuple[int, str]:
    """Return the number of records before the problem, and the problem."""
    rows = json_file.read(BufferedReader(BytesIO(content.encode())), "a.json")
    found: list[object] = []
    with pytest.raises(DataError) as caught:
        found.extend(rows)
    return len(found), caught.value.message


@pytest.mark.parametrize("indent", [None, 0, 2, "\t"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\n\n"])
def test_objects_on_a_line_or_over_several(indent: int | str | None, newline: str) -> None:
    texts = [json.dumps(record, indent=indent) for record in RECORDS]
    content = newline.join(texts).replace("\n", newline.replace("\n\n", "\n"))
    found = records(content)
    assert [record for _, record in found] == RECORDS
    lines = content.split("\n")
    assert all(lines[number - 1].startswith("{") for number, _ in found)


@pytest.mark.parametrize("indent", [None, 0, 2])
@pytest.mark.parametrize("around", ["{}", '{{"data": {}}}', '{{"version": {{"data": [1]}}, "data":\n{}, "end": [1]}}'])
def test_an_array_or_one_under_data(indent: int | None, around: str) -> None:
    content = around.format(json.dumps(RECORDS, indent=indent))
    assert [record for _, record in records(content)] == RECORDS


def test_the_line_is_that_of_the_record() -> None:
    content = '{"version": 1,\n"data":\n[{"a": 1}, {"a": 1},\n\n{"a":\n2}, {"a": 3}]}'
    assert [number for number, _ in read(content)] == [3, 3, 5, 6]
    assert [number for number, _ in read('\n{"a": 1}\n\n{\n"a": 2}\n{"a": 3}')] == [2, 4, 6]


@given(st.lists(st.sampled_from(RECORDS), max_size=6), st.sampled_from([None, 1]), st.integers(1, 40))
def test_where_a_chunk_ends_does_not_matter(items: list[object], indent: int | None, chunk: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_file, "CHUNK", chunk)
        assert [record for _, record in records(json.dumps(items, indent=indent))] == items


def test_a_broken_line_hides_no_other() -> None:
    lines = ['{"a": 1', '{"a": 2}', '{"a": "', "{", '{"a": [', '{"a": 3}', '{"a": 4}', "5", '{"a": {', '{"a": 6}']
    found = read("\n".join(lines))
    assert [(number, str(row, "utf-8").strip()) for number, row in found if isinstance(row, bytes)] == [
        (number, line) for number, line in enumerate(lines, start=1)
    ]


def test_lines_that_go_deeper_and_deeper_are_no_object() -> None:
    for line in ('{"a":', '{"a": [', '{"a": [{},', "{"):
        assert [number for number, _ in read((line + "\n") * 200)] == [*range(1, 201)]


def test_items_that_are_no_objects_are_records_to_refuse() -> None:
    assert [row for _, row in read('[1, "a, ]", {"b": 2}, null, [3]]')] == [
        b"1",
        b'"a, ]"',
        b'{"b": 2}',
        b"null",
        b"[3]",
    ]


def test_an_array_that_does_not_end_is_one_problem() -> None:
    for rest in ('{"a": ', '{"a": "b', "", " ,\n"):
        count, message = refused('[{"a": 1},\n' + rest)
        assert count == 1
        assert message.startswith("a.json is not valid JSON: line ")
        assert message.endswith("its array does not end")
    assert refused('[{"a": 1}}]') == (1, "a.json is not valid JSON: line 1: unexpected }")


def test_the_size_of_a_record_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_file, "RECORD_BYTES", 60)
    problem = "$: has more than 60 bytes; split it into several records"
    assert read('{"a": "' + "b" * 300 + '"}\n{"a": 1}') == [(1, problem), (2, b'{"a": 1}')]
    # An object over several lines that is too long: its first line is refused, as no object.
    found = read('{"a":\n[' + "1,\n" * 40 + "1]}\n")
    assert found[0] == (1, b'{"a":\n')


def test_arrays_one_after_the_other_lose_no_item() -> None:
    assert records('[{"a": 1}, {"a": 2}]\n[]\n[{"a": 3}]\n') == [(1, {"a": 1}), (1, {"a": 2}), (3, {"a": 3})]


@pytest.mark.parametrize("rest", ['{"a": 2}', ', {"a": 2}]', '"b"'])
@pytest.mark.parametrize("content", ['[{"a": 1}]\n', '{"data": [{"a": 1}], "end": {"a": [1]}}\n'])
def test_what_follows_an_array_is_not_dropped(content: str, rest: str) -> None:
    assert refused(content.replace("[{", "[\n{") + rest) == (
        1,
        "a.json is not valid JSON: line 3: more follows after its end",
    )


def test_a_line_with_an_array_under_data_is_a_record_if_others_follow() -> None:
    lines = [{"id": 1, "data": ["Hi", "Ahoy!"]}, {"id": 2, "data": ["Bye", "Arr!"]}]
    assert records("\n".join(map(json.dumps, lines))) == [(1, lines[0]), (2, lines[1])]


@pytest.mark.parametrize("between", ["\r", "", ", ", " "])
@pytest.mark.parametrize("end", ["", "\r", ",\n"])
def test_objects_on_one_line(between: str, end: str) -> None:
    found = records(between.join(map(json.dumps, RECORDS)) + end)
    assert found == [(1, record) for record in RECORDS]


@pytest.mark.parametrize("line", ['{"a": 1} x {"a": 2}', '{"a": 1}{"a"', '{"a": 1} "b"', '{"a": 1}]', '{"a": "}{'])
def test_a_line_of_more_than_objects_is_one_record_to_refuse(line: str) -> None:
    assert read(line + '\n{"a": 3}') == [(1, (line + "\n").encode()), (2, b'{"a": 3}')]
