"""Norms, distance and similarity of two adapters' updates, against dense ones."""

import math
from pathlib import Path

import pytest
import torch

from loradeck.lora.adapter import Adapter
from loradeck.lora.config import LoraConfig
from loradeck.lora.distance import ModuleDistance, compare, overall
from loradeck.lora.manifest import read_folder

Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]


def random_pairs(*paths: str, seed: int, r: int = 3) -> Pairs:
    generator = torch.Generator().manual_seed(seed)
    return {path: (torch.randn(r, 7, generator=generator), torch.randn(5, r, generator=generator)) for path in paths}


def save(folder: Path, pairs: Pairs, *, alpha: float = 6) -> Path:
    (r,) = {a.shape[0] for a, _ in pairs.values()}
    return Adapter.of(LoraConfig(r=r, lora_alpha=alpha, target_modules=[*pairs]), pairs).save(folder)


def dense(pairs: Pairs, path: str, scaling: float) -> torch.Tensor:
    if path not in pairs:
        return torch.zeros(5, 7, dtype=torch.float64)
    a, b = pairs[path]
    return scaling * b.double() @ a.double()


def compared(one: Path, two: Path) -> dict[str, ModuleDistance]:
    return {module.path: module for module in compare(read_folder(one), read_folder(two))}


def test_norms_and_similarity_are_those_of_the_dense_updates(tmp_path: Path) -> None:
    one, two = random_pairs("a.q", "b.q", seed=0), random_pairs("c.q", "b.q", seed=1, r=4)
    modules = compared(save(tmp_path / "one", one), save(tmp_path / "two", two, alpha=2))
    assert {*modules} == {"a.q", "b.q", "c.q"}
    assert [path for path, module in modules.items() if module.shared] == ["b.q"]
    for path, module in modules.items():
        d1, d2 = dense(one, path, 2.0), dense(two, path, 0.5)
        assert module.norms == pytest.approx((float(d1.norm()), float(d2.norm())))
        assert module.apart == pytest.approx(float((d1 - d2).norm()))
        assert module.product == pytest.approx(float((d1 * d2).sum()))
    both = modules["b.q"]
    assert both.similarity == pytest.approx(both.product / both.norms[0] / both.norms[1])
    assert (modules["a.q"].distance, modules["a.q"].similarity) == (pytest.approx(1), None)
    assert (modules["c.q"].distance, modules["c.q"].similarity) == (math.inf, None)
    apart = sum(module.apart**2 for module in modules.values())
    whole = sum(module.norms[0] ** 2 for module in modules.values())
    assert overall([*modules.values()]) == pytest.approx((apart / whole) ** 0.5)


@pytest.mark.parametrize("factor", [1.0, 3.0, -1.0])
def test_the_similarity_is_of_directions(tmp_path: Path, factor: float) -> None:
    one = random_pairs("a.q", seed=0)
    two = {path: (a, factor * b) for path, (a, b) in one.items()}
    (module,) = compared(save(tmp_path / "one", one), save(tmp_path / "two", two)).values()
    assert module.similarity == pytest.approx(math.copysign(1, factor), abs=1e-6)
    assert -1 <= module.similarity <= 1
    assert module.distance == pytest.approx(abs(1 - factor), abs=1e-6)


def test_a_zero_update_is_like_nothing(tmp_path: Path) -> None:
    one = random_pairs("a.q", seed=0)
    zero = {path: (a, 0 * b) for path, (a, b) in one.items()}
    folders = save(tmp_path / "one", one), save(tmp_path / "zero", zero)
    (module,) = compared(*folders).values()
    assert (module.similarity, module.distance) == (None, pytest.approx(1))
    (module,) = compared(*folders[::-1]).values()
    assert (module.similarity, module.distance) == (None, math.inf)
    (module,) = compared(folders[1], folders[1]).values()
    assert (module.similarity, module.distance) == (None, 0)
    assert overall([]) == 0


def test_replaced_modules_are_compared_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loradeck.lora.distance.CHUNK", 4)
    weights = [torch.randn(5, 7, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    pairs = random_pairs("a.q", seed=0)
    for name, weight in zip(("one", "two"), weights, strict=True):
        adapter = Adapter.of(LoraConfig(r=3, target_modules=["a.q"], modules_to_save=["head"]), pairs)
        full = Adapter.with_sites(adapter.config, adapter.sites, pairs, saved={"head": {"weight": weight}})
        full.save(tmp_path / name)
    head = compared(tmp_path / "one", tmp_path / "two")["head"]
    one, two = (weight.double() for weight in weights)
    assert head.shared
    assert head.norms == pytest.approx((float(one.norm()), float(two.norm())))
    assert head.apart == pytest.approx(float((one - two).norm()))
    assert head.similarity == pytest.approx(float((one * two).sum() / one.norm() / two.norm()))
