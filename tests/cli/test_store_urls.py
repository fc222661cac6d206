"""Every verb that takes a store's folder takes its URL; here a store in memory."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.test_store import adapter

from loradeck.store import AdapterStore


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("LORADECK_CACHE", str(tmp_path / "cache"))
    return f"memory://{tmp_path.name}/adapters"


@pytest.fixture
def filled(url: str) -> str:
    """poet@1, poet@2 and pirate@1."""
    for name, r in (("poet", 2), ("poet", 3), ("pirate", 4)):
        AdapterStore(url).publish(name, adapter(r))
    return url


def test_publish_and_versions(run: Callable, adapters: Path, url: str) -> None:
    for number, source in enumerate(("adapters/poet", "adapters/pirate", f"{url}/poet@1"), start=1):
        ran = run("publish", source, f"{url}/poet")
        assert (ran.code, ran.err.count("Traceback")) == (0, 0), ran.err
        assert ran.out.startswith(f"{url}/poet@{number}: ")
    report = json.loads(run("versions", f"{url}/poet", "--json").out)
    assert (report["name"], report["latest"], report["broken"]) == ("poet", 3, [])
    lines = [(line["name"], line["folder"], line["latest"]) for line in report["versions"]]
    assert lines == [(f"poet@{number}", f"{url}/poet@{number}", number == 3) for number in (1, 2, 3)]
    assert "latest" in run("versions", f"{url}/poet").out


def test_a_listing_has_the_lines_of_a_folders(run: Callable, adapters: Path, url: str) -> None:
    for place in ("store", url):
        for name in ("poet", "pirate", "poet"):
            assert run("publish", f"adapters/{name}", f"{place}/{name}").code == 0
    here, there = (json.loads(run("ls", place, "--json").out) for place in ("store", url))
    for line in (*here["adapters"], *there["adapters"]):
        assert line.pop("date")
        line.pop("folder")
    assert here == there
    assert [line["latest"] for line in there["adapters"]] == [True, False, True]
    assert run("ls", f"{url}/none").out == f"no adapters in {url}/none\n"


def test_ls_on_a_base(run: Callable, adapters: Path, url: str, tiny, tiny_tokenizer) -> None:
    tiny.save_pretrained("base")
    tiny_tokenizer.save_pretrained("base")
    run("publish", "adapters/poet", f"{url}/poet")
    AdapterStore(url).publish("wide", adapter(2, width=8))
    report = json.loads(run("ls", url, "--base", "base", "--json").out)
    assert {line["name"]: bool(line["cannot_be_served"]) for line in report["adapters"]} == {
        "poet@1": False,
        "wide@1": True,
    }


def test_show_and_diff_download(run: Callable, filled: str) -> None:
    shown = json.loads(run("show", f"{filled}/poet", "--json").out)
    assert (shown["name"], shown["config"]["r"]) == (f"{filled}/poet@2", 3)
    ran = run("diff", f"{filled}/poet@1", f"{filled}/poet")
    assert ran.code == 0, ran.err
    assert "distance over all modules" in ran.out


def test_pull_and_push_once(run: Callable, adapters: Path, filled: str) -> None:
    ran = run("pull", f"{filled}/poet@1")
    assert ran.out.startswith("adapters/poet@1: "), ran.err
    assert ran.out.endswith(f" of {filled}/poet@1, now the latest version\n")
    assert run("pull", f"{filled}/poet@1").out.endswith("the latest version already\n")
    assert AdapterStore("adapters").find("poet").equals(AdapterStore(filled).find("poet@1"))
    ran = run("push", "adapters/pirate", f"{filled}/pirate")
    assert ran.out.endswith("now the latest version of pirate\n"), ran.err
    assert run("push", "adapters/pirate", f"{filled}/pirate").out.endswith("already of pirate\n")
    assert AdapterStore(filled).versions("pirate") == [1, 2]
    assert run("pull", f"{filled}/pirate", f"{filled}/twin").code == 0
    assert AdapterStore(filled).names() == ["pirate", "poet", "twin"]


def test_generate_names_an_adapter_by_its_url(run: Callable, adapters: Path, url: str, tiny, tiny_tokenizer) -> None:
    tiny.save_pretrained("base")
    tiny_tokenizer.save_pretrained("base")
    run("publish", "adapters/poet", f"{url}/poet")
    options = ("--max-new-tokens", 8)
    here = run("generate", "base", "Hi", "-a", "adapters/poet", *options)
    there = run("generate", "base", "Hi", "-a", f"{url}/poet*1.0", *options)
    assert (there.code, there.out) == (0, here.out), there.err


def test_rm_and_prune(run: Callable, filled: str) -> None:
    ran = run("prune", filled, "--keep", 1, "--dry-run", "--json")
    report = json.loads(ran.out)
    assert (report["removed"], report["dry_run"]) == ([f"{filled}/poet@1"], True)
    assert run("prune", f"{filled}/poet", "--keep", 1, "--yes").code == 0
    assert AdapterStore(filled).versions("poet") == [2]
    assert run("rm", f"{filled}/poet@2").code == 2  # no terminal to ask on
    ran = run("rm", f"{filled}/poet", f"{filled}/pirate@1", "--yes")
    assert (ran.code, ran.out.splitlines()[-1]) == (0, "removed"), ran.err
    assert AdapterStore(filled).names() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("publish", "adapters/poet", "memory://poet"), "memory://poet does not name an adapter in a store"),
        (("show", "memory://nobody/adapters/poet"), "no adapter in memory://nobody/adapters is named 'poet'"),
        (("ls", "ftp://host/x"), "a store cannot be at ftp://"),
        (("versions", "memory://nobody/poet"), "no adapter in memory://nobody is named 'poet'"),
        (("push", "adapters/poet", "memory://x/poet", "--public"), "--public and --message are for the hub"),
        (("pull", "adapters"), "adapters is not a repository of the hub"),
        (("serve", "base", "--adapters", "memory://x/y", "--train"), "--train keeps its jobs in the folder"),
    ],
)
def test_one_clear_error(run: Callable, adapters: Path, url: str, arguments: tuple[str, ...], message: str) -> None:
    ran = run(*arguments)
    assert (ran.code, message in ran.err) == (2, True), ran.err


def test_an_error_names_the_url_rather_than_the_cache(
    run: Callable, url: str, tmp_path: Path, tiny, tiny_tokenizer
) -> None:
    tiny.save_pretrained("base")
    tiny_tokenizer.save_pretrained("base")
    AdapterStore(url).publish("wide", adapter(2, width=8))
    ran = run("generate", "base", "Hi", "-a", f"{url}/wide")
    assert ran.code == 2
    assert f"{url}/wide@1" in ran.err
    assert str(tmp_path) not in ran.err
