"""Where a base comes from: the hub's answers and silences, on a server of ours; names that are close."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import huggingface_hub
import pytest

from loradeck.base import source
from loradeck.base.load import Base, load_tokenizer
from loradeck.cli import main
from loradeck.errors import BaseModelError


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def use(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    url = f"http://127.0.0.1:{port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@contextmanager
def hub(monkeypatch: pytest.MonkeyPatch, status: int, **headers: str) -> Iterator[list[str]]:
    """Serve one answer to every request; yield the paths that were asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            if self.path.startswith("/owner/"):  # the client has questions of its own
                asked.append(self.path)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()

        do_GET = do_HEAD  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        use(monkeypatch, server.server_port)
        yield asked
        server.shutdown()
        thread.join()


def test_the_hub_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with hub(monkeypatch, 200, etag='"x"', X_Repo_Commit="0" * 40) as asked:
        assert source.reach("owner/name") == "owner/name"
    assert asked == ["/owner/name/resolve/main/config.json"]


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (404, "RepoNotFound", "the hub has no model owner/name"),
        (401, "GatedRepo", "owner/name is gated\nAccept its terms"),
        (503, "", "answers with an error: Server error '503"),
        (429, "", "answers with an error"),
    ],
)
def test_a_refusal_is_one_request_and_one_clear_error(
    monkeypatch: pytest.MonkeyPatch, status: int, code: str, message: str
) -> None:
    with hub(monkeypatch, status, **({"X_Error_Code": code} if code else {})) as asked:
        with pytest.raises(BaseModelError, match=message) as caught:
            Base.load("owner/name")
        assert len(asked) == 1
    assert str(caught.value).count("\n") == 1


def test_a_model_without_a_config_is_left_to_the_checks_of_its_files(monkeypatch: pytest.MonkeyPatch) -> None:
    with hub(monkeypatch, 404, X_Error_Code="EntryNotFound"):
        assert source.reach("owner/name") == "owner/name"


def test_a_hub_that_cannot_be_reached_is_tried_once(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        use(monkeypatch, closed.getsockname()[1])
    assert main(["generate", "owner/name", "Hi"]) == 2
    ran = capfd.readouterr()
    assert ran.out == ""
    assert ran.err.startswith("loradeck: owner/name is not in the cache, and http://127.0.0.1:")
    assert " cannot be reached: " in ran.err
    assert ran.err.endswith("\nCheck the network, or give a folder or a .gguf file.\n")
    assert ran.err.count("\n") == 2


def test_a_hub_that_does_not_answer_is_waited_for_a_short_time(monkeypatch: pytest.MonkeyPatch) -> None:
    assert source.TIMEOUT <= 5
    monkeypatch.setattr(source, "TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        use(monkeypatch, silent.getsockname()[1])
        with pytest.raises(BaseModelError, match=r"cannot be reached: .*time"):
            load_tokenizer("owner/name")


def test_without_the_hub_the_cache_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_folder: Path) -> None:
    repository = tmp_path / "cache" / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    tiny_folder.rename(repository / "snapshots" / ("0" * 40))
    with socket.create_server(("127.0.0.1", 0)) as closed:
        use(monkeypatch, closed.getsockname()[1])
    base = Base.load("owner/name", dtype="float32")
    assert (base.name, base.source) == ("owner/name", "owner/name")


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("smollm2", "Did you mean smollm2-135m?"),
        ("SmolLM2-135", "Did you mean smollm2-135m"),
        ("bases/tinyy", "Did you mean bases/tiny?"),
        ("bases/modle.gguf", "Did you mean bases/model.gguf?"),
        ("xyz", "Give a folder"),
        ("a\0b", "Give a folder"),
    ],
)
def test_a_mistyped_base_has_close_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_folder: Path, given: str, hint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bases").mkdir()
    tiny_folder.rename(tmp_path / "bases" / "tiny")
    (tmp_path / "bases" / "model.gguf").touch()
    with hub(monkeypatch, 404, X_Error_Code="RepoNotFound"), pytest.raises(BaseModelError) as caught:
        Base.load(given)
    assert caught.value.hint.startswith(hint)
