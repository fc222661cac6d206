import csv
import io

import pytest

from loradeck.dataset import delimited
from loradeck.errors import DataError

ROWS = [["prompt", "completion", "more; of it"], ["Hi, you", 'Ahoy,\n"matey"; |', "\t"], ["Grüße", "", "x"]]


def read(text: str) -> list[tuple[int, object]]:
    rows = delimited.read(io.BufferedReader(io.BytesIO(text.encode())), "a.csv")
    return [(number, row.message if isinstance(row, DataError) else row) for number, row in rows]


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("delimiter", delimited.DELIMITERS)
@pytest.mark.parametrize("end", ["\r\n", "\n"])
def test_the_delimiter_is_found(delimiter: str, quoting: int, end: str) -> None:
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter, quoting=quoting, lineterminator=end).writerows(ROWS)
    records = [dict(zip(ROWS[0], row, strict=True)) for row in ROWS[1:]]
    assert read(text.getvalue()) == [(2, records[0]), (3, records[1])]


def test_one_column_needs_no_delimiter() -> None:
    assert read("text\nA; b\n") == [(2, {"text": "A; b"})]
    assert read('text\n"a, b"\n') == [(2, {"text": "a, b"})]
    assert read("") == []


def test_a_file_for_excel_may_name_its_delimiter() -> None:
    assert read("sep=;\r\ntext\r\na\r\n") == [(3, {"text": "a"})]
    assert read("sep=,\na;b,c\n1,2\n") == [(3, {"a;b": "1", "c": "2"})]


def test_columns_without_a_name_may_be_several() -> None:
    assert read("a;b;;\n1;2;;\n") == [(2, {"a": "1", "b": "2", "": ""})]
    with pytest.raises(DataError, match="two columns of one name"):
        read("a,a\n1,2\n")


def test_a_bad_row_does_not_hide_the_others() -> None:
    rows = read('prompt,completion\na,b,c\n\nd,e\n"f" x,g\nh,i\n')
    assert "has 3 cells for 2 columns" in str(rows[0][1])
    assert rows[1] == (4, {"prompt": "d", "completion": "e"})
    assert rows[2][0] == 5
    assert "cannot be read from here on" in str(rows[2][1])
    assert len(rows) == 3


def test_a_quote_that_does_not_end_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delimited, "RECORD_BYTES", 100)
    [(number, problem)] = read('text\n"' + "a" * 10_000)
    assert number == 2
    assert "field larger than field limit (100)" in str(problem)


@pytest.mark.parametrize(
    "content", ['{"prompt": "a", "completion": "b"}\n', '[{"prompt": "a"}]', '\n[\n {"prompt": "a"}]']
)
def test_json_under_the_name_of_a_table_is_said(content: str) -> None:
    with pytest.raises(DataError, match="is JSON, not a table"):
        read(content)


def test_blanks_around_the_names_of_columns_do_not_count() -> None:
    assert read(" prompt , completion\n a , b\n") == [(2, {"prompt": " a ", "completion": " b"})]
