"""API keys: reading a file of them, authenticating a request, and what a key may do."""

import hashlib
from pathlib import Path

import pytest

from loradeck.api.auth import ANONYMOUS, ApiKey, ApiKeys
from loradeck.api.errors import HttpError
from loradeck.errors import ConfigError


def sha(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


@pytest.fixture
def keys(tmp_path: Path) -> ApiKeys:
    file = tmp_path / "keys.toml"
    file.write_text(
        f"[alice]\nsha256 = '{sha('ka')}'\nadapters = ['poet', 'team-*']\n[bob]\nsha256 = '{sha('kb-é')}'\ncontrol = true\n"
    )
    return ApiKeys.load(file)


def test_a_key_authenticates_by_its_hash(keys: ApiKeys) -> None:
    assert keys.authenticate("Bearer ka").name == "alice"
    assert keys.authenticate("bearer  " + "kb-é".encode().decode("latin-1")).name == "bob"  # as headers arrive


@pytest.mark.parametrize("header", [None, "", "ka", "Basic ka", "Bearer", "Bearer kA", f"Bearer {sha('ka')}"])
def test_a_wrong_or_missing_key_is_refused(keys: ApiKeys, header: str | None) -> None:
    with pytest.raises(HttpError) as caught:
        keys.authenticate(header)
    assert caught.value.status == 401
    assert caught.value.headers == {"www-authenticate": "Bearer"}


def test_a_key_may_use_the_adapters_of_its_patterns(keys: ApiKeys) -> None:
    alice = keys.authenticate("Bearer ka")
    alice.check_adapters(["poet", "team-a"])
    alice.check_adapters([])  # the base
    with pytest.raises(HttpError, match="pirate") as caught:
        alice.check_adapters(["poet", "pirate"])
    assert caught.value.status == 403
    with pytest.raises(HttpError):
        alice.check_control()
    keys.authenticate("Bearer " + "kb-é".encode().decode("latin-1")).check_control()


def test_patterns_are_case_sensitive() -> None:
    assert not ApiKey("a", "", ("poet",)).may_use("Poet")


def test_without_keys_every_request_may_do_everything() -> None:
    assert not ApiKeys()
    assert ApiKeys().authenticate(None) is ANONYMOUS
    ANONYMOUS.check_control()
    ANONYMOUS.check_adapters(["poet"])


@pytest.mark.parametrize(
    "text",
    ["", "[a]", "[a]\nsha256='short'", f"[a]\nsha256='{sha('k')}'\nadapter=['x']", "sha256='x'", "[", "\x00", "a=1"],
)
def test_an_invalid_file_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"keys\.toml"):
        ApiKeys.load(file)


def test_an_invalid_key_is_named(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(f"[alice]\nsha256='{sha('ka')}'\n[bob]\nsha256='short'\n")
    with pytest.raises(ConfigError, match=r"keys\.toml: \[bob\]: .*sha256"):
        ApiKeys.load(file)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        ApiKeys.load(tmp_path / "keys.toml")
