"""The soak, short and on a tiny base: it finds nothing wrong, and it would find what it looks for."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks.soak.catalogue import Catalogue
from benchmarks.soak.engine import Limits, soak
from benchmarks.soak.judge import Judge, Judgement, judge_all
from benchmarks.soak.requests import Answer, Ledger, Request

from loradeck import AdapterStore, Base
from loradeck.runner import prefix_cache
from loradeck.serve.config import EngineConfig
from loradeck.serve.engine import Engine

pytestmark = pytest.mark.slow

TOKEN_BYTES = 2 * 2 * 16 * 2 * 4  # of the tiny base: layers, heads, width, keys and values, float32


EVENTS = (
    *("requests", "refused", "length", "cancelled", "publishes", "loads by hand", "unloads by hand", "overtaken"),
    *("evictions", "prefixes found"),
)


def everything_happened(ledger: Ledger) -> bool:
    return len(ledger.answers) >= 100 and all(ledger.counts[event] for event in EVENTS)


def run_soak(
    base: Base, folder: Path, enough: Callable[[Ledger], bool] = everything_happened
) -> tuple[Ledger, dict[str, float], Judgement]:
    """Soak until there is enough, or for two minutes."""
    catalogue = Catalogue(base.model, folder, 24, strength=0.5)
    sizes = [catalogue.store.find(f"a{i}").facts.nbytes for i in range(24)]
    config = EngineConfig(
        max_rows=8,
        max_step_tokens=48,
        kv_cache_bytes=TOKEN_BYTES * 128 * 14,
        adapter_bytes=max(sum(sizes) // 4, 3 * max(sizes)),
        max_waiting=6,
        patience=0.05,
    )
    limits = Limits(
        120,
        clients=16,
        max_prompt=140,
        max_tokens=24,
        pause=0.05,
        config=config,
        enough=enough,
    )
    ledger, figures = soak(base, catalogue, limits, seed=0)
    return (
        ledger,
        figures,
        judge_all(base, catalogue.store, ledger.answers, [catalogue.folder(f"a{i}", 1) for i in range(4)]),
    )


def test_every_answer_is_its_own_and_nothing_is_left(base: Base, tmp_path: Path) -> None:
    ledger, figures, judgement = run_soak(base, tmp_path)
    assert ledger.errors == []
    assert (judgement.verdict.wrong, judgement.verdict.ended_wrong) == (0, 0)
    assert judgement.verdict.requests == len(ledger.answers)
    assert judgement.detected > 0.8 * judgement.controls > 0
    caches = {"left: bytes of prefixes, over the budget", "left: bytes of adapters, over the budget"}
    assert {name for name, value in figures.items() if value and name.startswith(("left", "after"))} <= caches
    assert max(figures[name] for name in caches) <= 1
    assert [event for event in EVENTS if not ledger.counts[event]] == []
    assert min(figures["evictions"], figures["prompt tokens found in the prefix cache"]) > 0
    assert ledger.lost == 0


def test_it_finds_a_cache_that_mixes_up_adapters(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = prefix_cache._key
    monkeypatch.setattr(prefix_cache, "_key", lambda *block: ((), *key(*block)[1:]))
    _, _, judgement = run_soak(base, tmp_path)
    assert judgement.verdict.wrong > 0


def test_it_finds_an_answer_from_a_wrong_version(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As if later versions were never visible.
    monkeypatch.setattr(Catalogue, "newest", lambda self, name: 1)
    monkeypatch.setattr(Catalogue, "latest", lambda self, name: 1)
    ledger, _, _ = run_soak(base, tmp_path, enough=lambda ledger: bool(ledger.errors))
    assert any("resolved to" in error for error in ledger.errors)


def test_it_forgives_no_bit(base: Base, tmp_path: Path) -> None:
    request = Request(
        (5, 6, 7), (), max_tokens=8, temperature=0.0, seed=0, logprobs=True, ignore_eos=True, cancel_after=None
    )
    with Engine(base, AdapterStore(tmp_path)) as engine:
        tokens = [*engine.submit(request.prompt, None, request.sampling)]
    right = Answer(request, [()], [token.id for token in tokens], [token.logprob or 0.0 for token in tokens], "length")
    judge = Judge(base, AdapterStore(tmp_path))
    assert judge.judge(right).right
    other = replace(right, tokens=[*right.tokens[:-1], (right.tokens[-1] + 1) % 260])
    assert judge.judge(other).wrong == 1
    moved = replace(right, logprobs=[math.nextafter(right.logprobs[0], 0.0), *right.logprobs[1:]])
    assert judge.judge(moved).wrong == 1
    assert judge.judge(replace(right, finish="stop")).ended_wrong
    assert judge.judge(replace(right, tokens=right.tokens[:-1], logprobs=right.logprobs[:-1])).ended_wrong
