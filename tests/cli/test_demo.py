import re
from collections.abc import Callable
from pathlib import Path

import pytest

from loradeck.base.load import Base
from loradeck.errors import BaseModelError
from loradeck.lora.manifest import read_folder


def test_without_the_real_base_it_stays_with_the_toy(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> Base:
        raise BaseModelError("no base at 'smollm2-135m'", hint="Install it.")

    monkeypatch.setattr(Base, "load", missing)
    ran = run("demo")
    assert ran.code == 0
    for message in ("says magenta", "0.00390625", "0.4333", "(1, 8, 1024)", "says indigo", "Install it."):
        assert message in " ".join(ran.out.split())
    assert not Path("adapters").exists()


@pytest.mark.slow
def test_the_whole_story(run: Callable, monkeypatch: pytest.MonkeyPatch, tiny_folder: Path) -> None:
    load = Base.load
    monkeypatch.setattr(Base, "load", lambda _: load(tiny_folder))
    for _ in range(2):  # the second run replaces its own adapters
        ran = run("demo", "--quick", "--adapters", "here")
        assert ran.code == 0, ran.err
        for name in ("pirate", "json"):
            assert f"saved in here/{name}: " in ran.out
            assert read_folder(Path("here") / name).origin.provenance["made_by"] == "loradeck demo"
        assert "one adapter loads in " in ran.out
        assert "half of each" in ran.out
        assert "4 rows in " in ran.out
        assert "loradeck chat smollm2-135m --adapter here/pirate --adapter here/json" in ran.out


def test_the_adapters_of_others_are_left_alone(run: Callable, adapters: Path) -> None:
    before = (adapters / "pirate" / "adapter_model.safetensors").read_bytes()
    ran = run("demo", "--adapters", adapters)
    assert ran.code == 2
    assert "that the demo has not made" in ran.err
    assert (adapters / "pirate" / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.real
def test_on_the_real_base(run: Callable, smollm2: Base) -> None:
    ran = run("demo", "--quick")
    assert ran.code == 0, ran.err
    # In the blocks of its file, but for the norms, which have the dtype of the machine.
    assert re.search(r"saved in adapters/pirate: 19\.5 MB, 20\.2% of the base's 96\.[56] MB", ran.out), ran.out
    assert "4 rows in " in ran.out
