import codecs
import gzip
import os
import sys
from importlib import import_module
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loradeck.dataset import text_file
from loradeck.dataset.text_file import ZSTD_MODULE, open_utf8
from loradeck.errors import DataError

zstd = import_module(ZSTD_MODULE)
TEXT = '{"text": "Grüße, Καλημέρα, 漢字 🦜"}\n{"text": "b"}\n'


def read(path: Path, encoding: str | None = None) -> str:
    with open_utf8(path, encoding) as file:
        return file.read().decode()


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def refused(path: Path, encoding: str | None = None) -> DataError:
    with pytest.raises(DataError) as caught:
        read(path, encoding)
    return caught.value


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstd.compress])
def test_unicode_is_recognised(tmp_path: Path, encoding: str, pack: type[bytes]) -> None:
    path = write(tmp_path / "a", pack(TEXT.encode(encoding)))
    assert read(path) == TEXT
    assert read(write(path, pack("[\n{}]".encode(encoding)))) == "[\n{}]"
    assert read(write(path, pack(b""))) == ""


def test_a_byte_order_mark_stands_above_the_encoding_that_was_named(tmp_path: Path) -> None:
    for encoding in ("utf-8-sig", "utf-16"):
        assert read(write(tmp_path / "a", TEXT.encode(encoding)), "cp1252") == TEXT
    assert read(write(tmp_path / "a", "Größe €".encode("cp1252")), "cp1252") == "Größe €"
    big = codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be")
    assert read(write(tmp_path / "a", big)) == TEXT


@given(st.text(min_size=2).filter(lambda text: text[0] not in "\ufeff\0"), st.integers(1, 9))  # NUL first is UTF-32
def test_where_a_chunk_ends_does_not_matter(tmp_path_factory: pytest.TempPathFactory, text: str, chunk: int) -> None:
    path = tmp_path_factory.getbasetemp() / "chunks"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_file, "CHUNK", chunk + 4)
        for encoding in ("utf-8-sig", "utf-16"):
            assert read(write(path, text.encode(encoding))) == text


def test_an_encoding_that_must_be_named_is_one_problem_with_what_it_looks_like(tmp_path: Path) -> None:
    error = refused(write(tmp_path / "a.csv", b"prompt;completion\nHi;Ahoy\n" + "Tschüß;Bye\n".encode("cp1252") * 50))
    assert error.message == (
        f"{tmp_path / 'a.csv'}:3: byte 0xfc is not utf-8; as cp1252, the encoding of Windows, it reads 'Tschüß;Bye'"
    )
    assert error.cli == "--encoding cp1252."


def test_a_damaged_byte_in_utf8_is_not_taken_for_another_encoding(tmp_path: Path) -> None:
    error = refused(write(tmp_path / "a", "Größe\n".encode() + b"Gr\xf6\xdfe\n"))
    assert "a:2: byte 0xf6 is not utf-8, though text before it is" in error.message
    assert "cp1252" not in error.message + error.hint


def test_what_is_no_text_is_said(tmp_path: Path) -> None:
    assert "is not text" in refused(write(tmp_path / "a", b"PK\x03\x04\x14\0\x06\0\xff\xfe")).message
    assert "a:1: byte 0x81 is not cp1252" in refused(write(tmp_path / "a", b"a\x81"), "cp1252").message


@pytest.mark.parametrize("pack", [gzip.compress, zstd.compress])
def test_a_damaged_archive_is_one_clear_error(tmp_path: Path, pack: type[bytes]) -> None:
    content = pack(os.urandom(1 << 19).hex().encode())
    for broken in (
        content[:-1],
        content[: len(content) // 2],
        content[:5],
        content[: 1 << 17] + b"x" * 99 + content[(1 << 17) + 99 :],
    ):
        error = refused(write(tmp_path / "a.jsonl.gz", broken))
        assert error.message.startswith(f"{tmp_path / 'a.jsonl.gz'} cannot be decompressed after line 1: ")
        assert error.hint == "Copy it again."


def test_several_archives_in_a_row_and_a_wrong_name(tmp_path: Path) -> None:
    for pack in (gzip.compress, zstd.compress):
        assert read(write(tmp_path / "a", pack(b"one\n") + pack(b"two\n"))) == "one\ntwo\n"
    # Some programs unpack a download but keep its name.
    assert read(write(tmp_path / "a.jsonl.gz", TEXT.encode())) == TEXT


def test_without_the_package_for_zstd_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl.zst", zstd.compress(b"a"))
    monkeypatch.setitem(sys.modules, ZSTD_MODULE, None)
    error = refused(path)
    assert error.message == f"{path} needs the package {ZSTD_MODULE}"
    assert "pip install 'loradeck[zstd]'" in error.hint


def test_a_small_file_that_decompresses_into_a_large_one_is_read_in_a_stream(tmp_path: Path) -> None:
    for pack in (gzip.compress, zstd.compress):
        path = write(tmp_path / "a", pack(b"a" * (1 << 26)))
        with open_utf8(path) as file:
            assert file.read(100) == b"a" * 100
            assert len(file.peek()) <= text_file.CHUNK
