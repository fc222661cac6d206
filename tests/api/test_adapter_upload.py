"""Adapters that are uploaded: folders and zips, as a browser sends them, whole, cut, unusable or hostile."""

import asyncio
import hashlib
import io
import os
import shutil
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from loradeck import AdapterStore
from loradeck.api import adapter_folder
from loradeck.api.auth import ApiKey, ApiKeys
from loradeck.api.config import ServerConfig

from .conftest import TIMEOUT, LocalServer, random_adapter, until

pytestmark = pytest.mark.slow

URL, CHAT = "/v1/adapters", "/v1/chat/completions"
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
Files = Mapping[str, bytes]


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


KEYS = ApiKeys(
    [
        ApiKey("operator", sha("ko"), control=True, create=("mine-*",)),
        ApiKey("alice", sha("ka")),
    ]
)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    """The files of an adapter."""
    folder = random_adapter(9).save(tmp_path / "saved")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def upload(server: LocalServer, name: str, files: Files, *, key: str = "", **headers: str) -> httpx.Response:
    parts = [("file", (path, content, "application/octet-stream")) for path, content in files.items()]
    return server.run(lambda client: client.post(URL, data={"name": name}, files=parts, headers=headers), key)


def zipped(files: Files, compression: int = zipfile.ZIP_DEFLATED) -> dict[str, bytes]:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for path, content in files.items():
            archive.writestr(path, content)
    return {"adapter.zip": buffer.getvalue()}


def below(folder: str, files: Files) -> dict[str, bytes]:
    return {f"{folder}/{path}": content for path, content in files.items()}


def traces(server: LocalServer, store: AdapterStore) -> tuple[object, ...]:
    """What a refused upload may not change: the store's folder, the versions, the adapters in memory."""
    inside = sorted(str(path.relative_to(store.folder)) for path in store.folder.rglob("*"))
    return inside, server.engine.adapter_cache.bank.names()


def error_of(response: httpx.Response) -> str:
    return str(response.json()["error"]["message"])


def test_a_folder_becomes_an_adapter(server: LocalServer, store: AdapterStore, files: Files) -> None:
    response = upload(server, "new", files)
    assert response.status_code == 200, response.text
    card = response.json()
    assert (card["id"], card["root"], card["parent"], card["object"]) == ("new@1", "new@1", "tiny", "model")
    assert (card["adapter"]["version"], card["adapter"]["loaded"]) == (1, True)
    assert {path.name: path.read_bytes() for path in store.find("new").path.iterdir()} == files
    assert server.request("/v1/models/new").json()["adapter"]["sha256"] == store.find("new").sha256()
    assert [path.name for path in store.folder.iterdir() if path.name.startswith(".")] == [".versions"]
    answer = server.request(CHAT, {"model": "new", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2})
    assert answer.status_code == 200


@pytest.mark.parametrize("form", ["folder", "zip", "zip of a folder", "stored zip", "windows"])
def test_folders_and_zips_of_any_depth(server: LocalServer, store: AdapterStore, files: Files, form: str) -> None:
    sent = {
        "folder": below("my-adapter", files),
        "zip": zipped(files),
        "zip of a folder": zipped(below("a/my-adapter", files)),
        "stored zip": zipped(files, zipfile.ZIP_STORED),
        "windows": {path.replace("/", "\\"): content for path, content in below("my-adapter", files).items()},
    }[form]
    assert upload(server, "new", sent).status_code == 200
    assert {path.name: path.read_bytes() for path in store.find("new").path.iterdir()} == files


def test_only_the_adapters_own_files_are_kept(server: LocalServer, store: AdapterStore, files: Files) -> None:
    others = {
        "optimizer.pt": b"x" * 1000,
        "adapter_model.bin": b"\x80\x04",
        ".git/config": b"",
        "__MACOSX/adapter_config.json": b"x",
        "checkpoint-2/adapter_config.json": b"x",
        "checkpoint-2/tokenizer.json": b"x",
    }
    for name, sent in (("one", {**files, **others}), ("two", zipped({**others, **files}))):
        assert upload(server, name, sent).status_code == 200
        assert {path.name for path in store.find(name).path.iterdir()} == {*files}


def test_the_next_version_of_a_name(server: LocalServer, store: AdapterStore, files: Files) -> None:
    assert upload(server, "poet", files).json()["id"] == "poet@3"
    assert upload(server, "poet", files).json()["id"] == "poet@3"  # it is the latest already
    assert store.versions("poet") == [1, 2, 3]


def test_uploads_of_one_name_at_once_are_one_version_each(
    server: LocalServer, store: AdapterStore, tmp_path: Path
) -> None:
    folders = [random_adapter(seed).save(tmp_path / str(seed)) for seed in (20, 21, 22)]

    async def test(client: httpx.AsyncClient) -> list[str]:
        def send(folder: Path) -> Any:
            parts = [("file", (path.name, path.read_bytes())) for path in folder.iterdir()]
            return client.post(URL, data={"name": "new"}, files=parts)

        return sorted(answer.json()["id"] for answer in await asyncio.gather(*map(send, folders)))

    assert server.run(test) == ["new@1", "new@2", "new@3"]
    assert store.versions("new") == [1, 2, 3]


# ---- refusals


def test_every_problem_is_told_in_a_line(server: LocalServer, store: AdapterStore, tmp_path: Path) -> None:
    folder = random_adapter(9).save(tmp_path / "saved")
    tensors = load_file(folder / TENSORS)
    missing = [name for name in sorted(tensors) if "lora_A" in name][:3]
    rest = {name: tensor for name, tensor in tensors.items() if name not in missing}
    save_file(rest, folder / TENSORS, {"format": "pt"})
    before = traces(server, store)
    response = upload(server, "new", {path.name: path.read_bytes() for path in folder.iterdir()})
    assert response.status_code == 422
    lines = error_of(response).splitlines()
    assert len(lines) > 3
    for name in missing:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        assert f"{module} has B only, not one A and one B" in lines
    assert str(store.folder) not in response.text
    assert ".new." not in response.text
    assert traces(server, store) == before


@pytest.mark.parametrize(
    ("kind", "status", "says"),
    [
        ("another base", 422, "base"),
        ("NaN", 422, "NaN"),
        ("cut short", 422, "adapter_model.safetensors"),
        ("no config", 422, "no adapter_config.json"),
        ("no tensors", 422, "safetensors"),
        ("a pickle", 422, "adapter_model.bin is a pickle"),
        ("mlx", 422, "mlx-lm"),
        ("too large", 400, "adapter_bytes"),
        ("two adapters", 422, "several adapters"),
        ("bad tokenizer", 422, "tokenizer.json"),
    ],
)
@pytest.mark.parametrize("as_zip", [False, True])
def test_an_adapter_that_cannot_be_used_leaves_nothing(
    server: LocalServer, store: AdapterStore, files: dict[str, bytes], tmp_path: Path, kind: str, status: int, says: str, as_zip: bool
) -> None:  # fmt: skip
    server.engine.adapter_cache.bank.model.fingerprint = server.engine.base.fingerprint
    if kind == "another base":
        adapter = random_adapter(9)
        adapter.describe(base_fingerprint="0" * 64)
        files = {path.name: path.read_bytes() for path in adapter.save(tmp_path / "other").iterdir()}
    elif kind == "NaN":
        tensors = load_file(tmp_path / "saved" / TENSORS)
        next(iter(tensors.values()))[0, 0] = torch.nan
        save_file(tensors, tmp_path / "nan", {"format": "pt"})
        files[TENSORS] = (tmp_path / "nan").read_bytes()
    elif kind == "cut short":
        files[TENSORS] = files[TENSORS][:-4]
    elif kind == "no config":
        del files[CONFIG]
    elif kind == "no tensors":
        del files[TENSORS]
    elif kind == "a pickle":
        del files[TENSORS]
        files["adapter_model.bin"] = b"\x80\x04"
    elif kind == "mlx":
        files = {CONFIG: b'{"fine_tune_type": "lora", "lora_parameters": {}}', "adapters.safetensors": files[TENSORS]}
    elif kind == "too large":
        server.engine.adapter_cache.budget = 100
    elif kind == "two adapters":
        files = {**below("a", files), **below("b", files)}
    elif kind == "bad tokenizer":
        files["tokenizer.json"] = b"no"
    before = traces(server, store)
    response = upload(server, "new", zipped(files) if as_zip else files)
    assert response.status_code == status, response.text
    assert says in error_of(response)
    assert str(store.folder) not in response.text
    assert traces(server, store) == before


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/etc/adapter_config.json", "is absolute"),
        ("C:/adapter_config.json", "is absolute"),
        ("../adapter_config.json", "leads out"),
        ("a/../../adapter_config.json", "leads out"),
        ("a\\..\\..\\adapter_config.json", "leads out"),
        ("adapter_model" + "x" * 300 + ".safetensors", "too long"),
        ("a/" * 600 + "adapter_config.json", "too long"),
        ("adapter_config.json\x7f", "unprintable"),
    ],
)
@pytest.mark.parametrize("as_zip", [False, True])
def test_a_path_that_leads_out_of_the_folder_is_refused(
    server: LocalServer, store: AdapterStore, files: Files, path: str, says: str, as_zip: bool
) -> None:
    sent = {**files, path: b"{}"}
    before = traces(server, store)
    response = upload(server, "new", zipped(sent) if as_zip else sent)
    assert response.status_code == 400, response.text
    assert says in error_of(response)
    assert traces(server, store) == before


def broken_zip(kind: str, files: Files) -> dict[str, bytes]:
    (content,) = zipped(files).values()
    if kind == "no zip":
        content = b"PK\x03\x04" + b"x" * 100
    elif kind == "cut short":
        content = content[: len(content) // 2]
    elif kind == "damaged":
        at = content.index(TENSORS.encode()) + len(TENSORS) + 50
        content = content[:at] + bytes(byte ^ 0xFF for byte in content[at : at + 100]) + content[at + 100 :]
    elif kind == "encrypted":
        at = content.rindex(b"PK\x01\x02", 0, content.rindex(TENSORS.encode()))
        content = content[: at + 8] + b"\x01" + content[at + 9 :]
    elif kind == "lzma":
        return zipped(files, zipfile.ZIP_LZMA)
    elif kind == "long list":
        # A list of members of two megabytes, which would be read at once.
        buffer = io.BytesIO(content)
        with zipfile.ZipFile(buffer, "a") as archive:
            archive.comment = b""
            for number in range(20_000):
                archive.writestr(f"{number:060}", b"")
        content = buffer.getvalue()
    elif kind == "empty":
        content = b""
    return {"adapter.zip": content}


@pytest.mark.parametrize("kind", ["no zip", "cut short", "damaged", "encrypted", "lzma", "long list", "empty"])
def test_a_zip_that_cannot_be_read_leaves_nothing(
    server: LocalServer, store: AdapterStore, files: Files, kind: str
) -> None:
    before = traces(server, store)
    response = upload(server, "new", broken_zip(kind, files))
    assert response.status_code == 422, response.text
    assert "the zip cannot be read" in error_of(response)
    assert traces(server, store) == before


def test_a_zip_holds_no_more_than_an_upload(server: LocalServer, store: AdapterStore, files: Files) -> None:
    """Forty megabytes of zeros are forty kilobytes in a zip."""
    server = server.configured(config=ServerConfig(max_adapter_upload_bytes=1 << 20))
    before = traces(server, store)
    for name in ("zeros", "tokenizer.json"):  # whether it would be kept or not
        response = upload(server, "new", zipped({**files, name: bytes(40 << 20)}))
        assert response.status_code == 413
        assert "the zip holds" in error_of(response)
    assert traces(server, store) == before


def test_the_numbers_of_files_are_bounded(
    server: LocalServer, store: AdapterStore, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loradeck.api.adapter_upload.MAX_FILES", 5)
    monkeypatch.setattr(adapter_folder, "MAX_FILES", 5)
    before = traces(server, store)
    many = {**files, **{f"{number}.txt": b"x" for number in range(5)}}
    for sent in (many, zipped(many)):
        response = upload(server, "new", sent)
        assert response.status_code == 413
        assert "more than 5 files" in error_of(response)
    assert traces(server, store) == before


@pytest.mark.parametrize("keep", [True, False])
def test_an_upload_that_is_too_large_is_refused(
    server: LocalServer, store: AdapterStore, files: Files, keep: bool
) -> None:
    server = server.configured(config=ServerConfig(max_adapter_upload_bytes=100_000))
    before = traces(server, store)
    response = upload(server, "new", {**files, "tokenizer.json" if keep else "optimizer.pt": b"x" * 200_000})
    assert response.status_code == 413
    assert "larger than 100000 bytes" in error_of(response)
    assert traces(server, store) == before


@pytest.mark.parametrize(
    ("files_of", "status", "says"),
    [
        (lambda files: {**zipped(files), **files}, 400, "a zip and other files"),
        (lambda files: {**files, f"./{CONFIG}": b"{}"}, 400, "twice"),
        (lambda files: {}, 400, "no file"),
        (lambda files: {"poet.gguf": b"GGUF"}, 422, "only 'poet.gguf'"),
        (lambda files: {".hidden": b""}, 422, "hidden files"),
    ],
)
def test_a_form_that_makes_no_sense_is_refused(
    server: LocalServer, store: AdapterStore, files: Files, files_of: Any, status: int, says: str
) -> None:
    before = traces(server, store)
    sent = files_of(files)
    if sent:
        response = upload(server, "new", sent)
    else:
        content = b'--x\r\ncontent-disposition: form-data; name="name"\r\n\r\nnew\r\n--x--\r\n'
        headers = {"content-type": "multipart/form-data; boundary=x"}
        response = server.run(lambda client: client.post(URL, content=content, headers=headers))
    assert response.status_code == status, response.text
    assert says in error_of(response)
    assert traces(server, store) == before


@pytest.mark.parametrize("name", ["", "a/b", "..", ".x", "a@2", "a+b", "tiny", "a" * 200, " a"])
def test_a_name_that_no_adapter_can_have(server: LocalServer, store: AdapterStore, files: Files, name: str) -> None:
    before = traces(server, store)
    response = upload(server, name, files)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "name"), response.text
    assert traces(server, store) == before


def test_a_form_without_a_name(server: LocalServer, store: AdapterStore, files: Files) -> None:
    before = traces(server, store)
    response = server.run(lambda client: client.post(URL, files=[("file", pair) for pair in files.items()]))
    assert (response.status_code, response.json()["error"]["param"]) == (400, "name"), response.text
    assert traces(server, store) == before


# ---- who may


def test_keys(server: LocalServer, store: AdapterStore, files: Files) -> None:
    server = server.configured(keys=KEYS)
    before = traces(server, store)
    assert upload(server, "mine-1", files).status_code == 401
    assert upload(server, "mine-1", files, key="ka").status_code == 403  # no control
    refused = upload(server, "poet", files, key="ko")
    assert (refused.status_code, refused.json()["error"]["param"]) == (403, "name")
    assert "mine-*" in error_of(refused)
    assert traces(server, store) == before
    assert upload(server, "mine-1", files, key="ko").status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"content-encoding": "gzip"}, 415),
        ({"origin": "http://localhost"}, 200),
    ],
)
def test_headers(server: LocalServer, store: AdapterStore, files: Files, headers: dict[str, str], status: int) -> None:
    before = traces(server, store)
    assert upload(server, "new", files, **headers).status_code == status
    assert (traces(server, store) == before) == (status != 200)


# ---- the disk, and clients that leave


def test_a_full_disk_is_told_before_the_files_arrive(
    server: LocalServer, store: AdapterStore, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 10

    before = traces(server, store)
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage)
    response = upload(server, "new", files)
    assert response.status_code == 507
    assert "no room" in error_of(response)
    assert traces(server, store) == before


def test_a_store_that_cannot_be_changed_leaves_nothing(server: LocalServer, store: AdapterStore, files: Files) -> None:
    shutil.rmtree(store.folder / ".versions")
    (store.folder / ".versions").touch()  # publishing needs a folder here
    before = traces(server, store)
    response = upload(server, "new", files)
    assert response.status_code == 422
    assert "the store cannot be changed" in error_of(response)
    assert traces(server, store) == before


def test_what_a_kill_left_is_removed_a_day_later(server: LocalServer, store: AdapterStore, files: Files) -> None:
    left = store.folder / ".new.left"
    (left / "parts").mkdir(parents=True)
    (left / "parts" / "0").touch()
    yesterday = time.time() - 100_000
    for path in (left, left / "parts"):
        os.utime(path, (yesterday, yesterday))
    assert upload(server, "new", files).status_code == 200
    assert left.exists()  # its file may still grow
    os.utime(left / "parts" / "0", (yesterday, yesterday))
    assert upload(server, "new", files).status_code == 200
    assert not left.exists()


def test_a_client_that_leaves_half_way_leaves_nothing(server: LocalServer, store: AdapterStore, files: Files) -> None:
    async def main(url: str) -> None:
        host, port = url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        part = f'--x\r\ncontent-disposition: form-data; name="file"; filename="{CONFIG}"\r\n\r\n'.encode()
        head = f"POST {URL} HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\n"
        writer.write(f"{head}Content-Length: 1000000\r\n\r\n".encode() + part + b"1" * 1000)
        await until(lambda: any(store.folder.glob(".new.*/parts/0")))
        writer.close()
        await until(lambda: not any(store.folder.glob(".new.*")))

    before = traces(server, store)
    with server.listening() as (url, _):
        asyncio.run(asyncio.wait_for(main(url), TIMEOUT))
    assert traces(server, store) == before
