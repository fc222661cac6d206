import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from loradeck.lora.adapter import Adapter
from loradeck.lora.bank import Bank
from loradeck.lora.config import LoraConfig
from loradeck.lora.distance import compare, overall
from loradeck.lora.manifest import AdapterFiles, read_folder


def update(adapter: Adapter, path: str) -> torch.Tensor:
    a, b = adapter.pair(path)
    return adapter.sites[path].scaling * b.double() @ a.double()


def distances(first: AdapterFiles, second: AdapterFiles) -> tuple[dict[str, float], float]:
    modules = compare(first, second)
    return {module.path: module.distance for module in modules if module.shared}, overall(modules)


def test_the_distance_is_that_of_the_dense_updates(adapters: Path, tiny: LlamaForCausalLM) -> None:
    bank = Bank(tiny)
    one, two = (bank[bank.load(adapters / name)] for name in ("poet", "pirate"))
    each, overall = distances(read_folder(adapters / "poet"), read_folder(adapters / "pirate"))
    assert each.keys() == one.sites.keys() & two.sites.keys()
    for path, distance in each.items():
        expected = (update(one, path) - update(two, path)).norm() / update(one, path).norm()
        assert distance == pytest.approx(float(expected))
    apart = whole = 0.0
    for path in one.sites.keys() | two.sites.keys():
        dense = [update(adapter, path) if path in adapter.sites else torch.zeros(1, 1) for adapter in (one, two)]
        apart, whole = apart + float((dense[0] - dense[1]).square().sum()), whole + float(dense[0].square().sum())
    assert overall == pytest.approx(math.sqrt(apart / whole))


def test_the_distance_to_itself_is_zero(run: Callable, adapters: Path) -> None:
    ran = run("diff", adapters / "poet", adapters / "poet")
    assert ran.code == 0
    assert ran.out.startswith("the settings are equal\n")
    assert ran.out.endswith("distance over all modules: 0\n")


def test_modules_that_adapters_replace_are_compared(run: Callable, tmp_path: Path, tiny: LlamaForCausalLM) -> None:
    bank = Bank(tiny)
    for name, scale in (("one", 1.0), ("two", 1.5)):
        config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
        adapter = bank.add(name, config, generator=torch.Generator().manual_seed(0))
        adapter.saved_module("lm_head")["weight"].data.mul_(scale * 2)
        bank.save(name, tmp_path / name)
    bank.add("bare", LoraConfig(r=2, target_modules=["q_proj"]), generator=torch.Generator().manual_seed(0))
    bank.save("bare", tmp_path / "bare")
    each, overall = distances(read_folder(tmp_path / "one"), read_folder(tmp_path / "two"))
    assert each["lm_head"] == pytest.approx(0.5)
    assert overall == pytest.approx(0.5)
    assert ["lm_head", "1", "0.5", "0.5", "0.5"] in [
        line.split() for line in run("diff", "one", "two").out.splitlines()
    ]
    assert "only in one: lm_head (1)" in run("diff", "one", "bare").out
    assert run("diff", "one", "bare").out.endswith("distance over all modules: 1\n")


def test_it_says_what_differs(run: Callable, adapters: Path) -> None:
    ran = run("diff", "adapters/poet", "adapters/pirate")
    lines = [line.split() for line in ran.out.splitlines()]
    assert ["setting", "adapters/poet", "adapters/pirate"] in lines
    assert ["r", "4", "8"] in lines
    assert "only in adapters/poet: model.layers.*.mlp.up_proj (2)" in ran.out
    assert "only in adapters/pirate: model.embed_tokens (1)" in ran.out
    assert ["model.layers.*.self_attn.q_proj", "2"] in [line[:2] for line in lines]
    every = run("diff", "adapters/poet", "adapters/pirate", "--modules").out
    assert "model.layers.1.self_attn.q_proj" in every


def test_json(run: Callable, adapters: Path) -> None:
    report = json.loads(run("diff", adapters / "poet", adapters / "pirate", "--json").out)
    assert report["settings"]["r"] == [4, 8]
    assert report["only"]["second"] == ["model.embed_tokens"]
    assert len(report["distances"]) == 2
    assert report["distance"] > 0
    headers = json.loads(run("diff", adapters / "poet", adapters / "pirate", "--headers", "--json").out)
    assert headers == {key: report[key] for key in ("settings", "only")}


def test_the_distance_from_a_zero_update_is_infinite(run: Callable, adapters: Path, tiny: LlamaForCausalLM) -> None:
    bank = Bank(tiny)
    bank.add("fresh", LoraConfig(r=4))
    bank.save("fresh", adapters / "fresh")
    assert run("diff", adapters / "fresh", adapters / "poet").out.endswith(": inf\n")
    assert run("diff", adapters / "fresh", adapters / "fresh").out.endswith(": 0\n")
    assert json.loads(run("diff", adapters / "fresh", adapters / "poet", "--json").out)["distance"] is None


def test_adapters_of_other_bases_are_refused(run: Callable, adapters: Path) -> None:
    site = read_folder(adapters / "poet").sites["model.layers.0.self_attn.q_proj"]
    config = LoraConfig(r=4, target_modules=["q_proj"])
    pair = torch.ones(4, site.a_shape[1] * 2), torch.ones(site.b_shape)
    Adapter.of(config, {"model.layers.0.self_attn.q_proj": pair}).save(adapters / "wide")
    ran = run("diff", adapters / "poet", adapters / "wide")
    assert ran.code == 2
    assert "model.layers.0.self_attn.q_proj: A (4, 64)" in ran.err


def test_grouped_convolutions_have_a_distance(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3, groups=2))
    bank = Bank(model)
    for name in ("a", "b"):
        adapter = bank.add(name, LoraConfig(r=4, target_modules=["0"]))
        for parameter in adapter.parameters():
            torch.nn.init.normal_(parameter.data)
        bank.save(name, tmp_path / name)
    each, _ = distances(read_folder(tmp_path / "a"), read_folder(tmp_path / "b"))
    (a, b), (c, d) = (bank[name].pair("0") for name in ("a", "b"))
    dense = [
        torch.block_diag(*out.detach().flatten(1).chunk(2)) @ into.detach().flatten(1) for into, out in ((a, b), (c, d))
    ]
    assert each["0"] == pytest.approx(float((dense[0] - dense[1]).norm() / dense[0].norm()), rel=1e-5)
