"""The soak for seconds on a tiny base; and that it would find out what it is there to find out."""

from pathlib import Path

import pytest
import torch
from benchmarks.soak.engine import Bounds, soak
from benchmarks.soak.judge import BOUND, Alone, Judgement, judged
from benchmarks.soak.requests import Asked, Ledger, Told
from benchmarks.soak.store import Crowd

from loradeck import Base
from loradeck.serve.config import EngineConfig
from loradeck.serve.prefix_cache import PrefixCache

TOKEN_BYTES = 2 * 2 * 16 * 2 * 4  # of the tiny base: layers, heads, width, keys and values, float32


def soaked(base: Base, folder: Path, seconds: float) -> tuple[Ledger, dict[str, float], Judgement]:
    crowd = Crowd(base.model, folder, 24, strength=0.5)
    sizes = [crowd.store.find(f"a{i}").facts.nbytes for i in range(24)]
    config = EngineConfig(
        max_rows=8,
        max_step_tokens=48,
        kv_cache_bytes=TOKEN_BYTES * 128 * 14,
        adapter_bytes=max(sum(sizes) // 4, 3 * max(sizes)),
        max_waiting=6,
        patience=0.05,
    )
    bounds = Bounds(seconds, clients=16, longest=140, answer=24, pause=0.05, config=config)
    ledger, left = soak(base, crowd, bounds, seed=0)
    assert ledger.told
    return ledger, left, judged(base, ledger.told, [crowd.folder(f"a{i}", 1) for i in range(4)])


def test_every_answer_is_its_own_and_nothing_is_left(base: Base, tmp_path: Path) -> None:
    ledger, left, judgement = soaked(base, tmp_path, seconds=4)
    assert ledger.errors == []
    assert (judgement.verdict.wrong, judgement.verdict.ended_wrong) == (0, 0)
    assert judgement.verdict.requests == len(ledger.told)
    assert judgement.apart > 0.8 * judgement.controls > 0
    assert {own: value for own, value in left.items() if value and own.startswith(("left", "after"))}.keys() <= {
        "left: bytes of prefixes, over the budget",
        "left: bytes of adapters, over the budget",
    }
    assert max(left["left: bytes of prefixes, over the budget"], left["left: bytes of adapters, over the budget"]) <= 1
    happened = ("requests", "refused", "length", "cancelled", "publishes", "loads by hand", "unloads by hand", "overtaken")  # fmt: skip
    assert [own for own in happened if not ledger.counts[own]] == []
    assert min(left["evictions"], left["prompt tokens found in the prefix cache"]) > 0
    assert ledger.lost == 0


def test_it_finds_a_cache_that_does_not_tell_adapters_apart(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find, keep = PrefixCache.find, PrefixCache.keep
    monkeypatch.setattr(PrefixCache, "find", lambda self, _, tokens: find(self, (), tokens))
    monkeypatch.setattr(PrefixCache, "keep", lambda self, _, *rest: keep(self, (), *rest))
    _, _, judgement = soaked(base, tmp_path, seconds=2)
    assert judgement.verdict.wrong > 0


def test_it_finds_an_answer_from_a_wrong_version(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Crowd, "newest", lambda self, name: 1)
    monkeypatch.setattr(Crowd, "latest", lambda self, name: 1)  # as if what is published later were not to be seen
    ledger, _, _ = soaked(base, tmp_path, seconds=2)
    assert any("was taken for" in error for error in ledger.errors)


@torch.no_grad()
def test_it_forgives_what_rounding_does_to_a_text_and_no_more(base: Base) -> None:
    prompt, count = (5, 6, 7), 8

    def told(off: float) -> Told:
        tokens, logprobs = [*prompt], []
        for _ in range(count):
            after = base.model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
            tokens.append(int(after.argmax()))
            logprobs.append(float(after.max()) + off)
        asked = Asked(prompt, (), count, temperature=0.0, seed=0, scored=True, endless=True, leaves=None)
        return Told(asked, [()], tokens[len(prompt) :], logprobs, "length")

    alone = Alone(base)
    verdict = alone.judge(told(2 * BOUND))
    assert (verdict.wrong, verdict.shaken) == (count, 1)
    assert verdict.bound < 1.1 * BOUND
    # Ten thousand turns of the circle: what rounding left in the last bits of a hidden state now shows in the scores.
    with base.model.lm_head.register_forward_pre_hook(lambda _, given: torch.sin(given[0] * 1e4)):
        verdict = alone.judge(told(2 * BOUND))
        assert (verdict.wrong, verdict.shaken) == (0, 1)
        assert alone.judge(told(2 * verdict.bound)).wrong == count
    alone.close()
