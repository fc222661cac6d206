import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def test_it_lists_adapters_and_why_others_are_invalid(run: Callable, adapters: Path) -> None:
    (adapters / ".poet.half-written").mkdir()
    (adapters / "notes").mkdir()
    ran = run("ls")
    assert ran.code == 0
    head, pirate, poet, cut = ran.out.splitlines()
    assert head.split() == ["name", "r", "alpha", "targets", "modules", "parameters", "size", "base"]
    assert pirate.split()[:5] == ["pirate", "8", "8", "embed_tokens,", "q_proj"]
    assert poet.split()[:3] == ["poet", "4", "32"]
    assert " 14 " in poet
    assert cut.startswith("cut is invalid: adapters/cut/adapter_model.safetensors")


def test_one_adapter_is_a_list_of_one(run: Callable, adapters: Path) -> None:
    assert [line.split()[0] for line in run("ls", adapters / "poet").out.splitlines()] == ["name", "poet"]


def test_json(run: Callable, adapters: Path) -> None:
    report = json.loads(run("ls", adapters, "--json").out)
    assert [each["name"] for each in report["adapters"]] == ["pirate", "poet"]
    assert report["adapters"][1]["r"] == [4]
    assert report["adapters"][1]["parameters"] * 4 == report["adapters"][1]["bytes"]
    assert [each["name"] for each in report["broken"]] == ["cut"]


def test_an_empty_folder_has_no_adapters(run: Callable, tmp_path: Path) -> None:
    ran = run("ls", tmp_path)
    assert (ran.code, ran.out) == (0, f"no adapters in {tmp_path}\n")
    assert json.loads(run("ls", tmp_path, "--json").out) == {"adapters": [], "broken": []}


def test_a_file_is_refused(run: Callable, adapters: Path) -> None:
    ran = run("ls", adapters / "poet" / "README.md")
    assert ran.code == 2
    assert "is a file" in ran.err


def test_a_folder_without_permission_does_not_stop_the_others(
    run: Callable, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.stat

    def stat(path: Path, **options: Any) -> os.stat_result:
        if path.parent.name == "pirate":
            raise PermissionError(13, "Permission denied")
        return real(path, **options)

    monkeypatch.setattr(Path, "stat", stat)
    ran = run("ls")
    assert ran.code == 0
    assert "poet " in ran.out
    assert "pirate is invalid: adapters/pirate/adapter_config.json cannot be read: Permission denied" in ran.out


def test_untrusted_names_have_no_control_characters(run: Callable, adapters: Path) -> None:
    (adapters / "poet").rename(adapters / "po\x1b[31met")
    assert "\x1b" not in run("ls").out
