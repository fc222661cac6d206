"""Thousands of adapters for minutes, at random; then every answer is held against what its request gets alone.

    python -m benchmarks.soak [--seconds 180] [--adapters 2000] [--over engine|http|both] [--seed 0]

SmolLM2-135M in float32; each adapter has weights of its own, of rank 2 to 16, on layers of its own; Zipf 1.5. There
is room for sixteen adapters, for keys and values of a few rows, and for few that wait. Many clients ask at random: for
adapters, versions, scales, blends, the base; greedily and with seeds; with prompts that share their beginnings; and
some go away in the middle. Meanwhile adapters are loaded, unloaded and published by hand.

A token is wrong where it is not the likeliest of a plain forward through the request's own adapters, or, of one that
was drawn, where its seed's number lies outside its share. It is forgiven within 1e-3, and so is a log-probability; and
within what rounding does to this very text, where that is more.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.record import RESULTS, write
from benchmarks.soak import engine, server
from benchmarks.soak.alone import Judgement, judged
from benchmarks.soak.asked import Ledger
from benchmarks.soak.crowd import Crowd
from benchmarks.soak.engine import Bounds
from loradeck import Base
from loradeck.base.onednn import cap_kernel_cache
from loradeck.serve.config import EngineConfig

FIT = 16  # adapters of a middling size that there is room for
ROWS_BYTES = 130_000_000  # twenty-two rows of 128 tokens, in float32
WAYS = {"engine": engine.soak, "http": server.soak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=180.0, help="of each way")
    parser.add_argument("--adapters", type=int, default=2000)
    parser.add_argument("--over", choices=[*WAYS, "both"], default="both")
    parser.add_argument("--clients", type=int, default=28)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chosen = [*WAYS] if arguments.over == "both" else [arguments.over]
    cap_kernel_cache()
    base = Base.load("smollm2-135m", dtype="float32")
    clean = True
    with tempfile.TemporaryDirectory() as folder:
        begun = time.monotonic()
        crowd = Crowd(base.model, Path(folder), arguments.adapters)
        sizes = [crowd.store.find(f"a{number}").facts.nbytes for number in range(min(200, arguments.adapters))]
        print(f"{arguments.adapters} adapters after {time.monotonic() - begun:.0f} s", flush=True)
        config = EngineConfig(
            max_step_tokens=128,
            kv_cache_bytes=ROWS_BYTES,
            adapter_bytes=FIT * sum(sizes) // len(sizes),
            max_waiting=arguments.clients - 20,
            patience=0.5,
        )
        bounds = Bounds(arguments.seconds, arguments.clients, longest=140, answer=24, pause=0.5, config=config)
        for way in chosen:
            ledger, left = WAYS[way](base, crowd, bounds, arguments.seed)
            print(f"{way}: {len(ledger.told)} answers are judged", flush=True)
            begun = time.monotonic()
            judgement = judged(base, ledger.told, [crowd.folder(f"a{number}", 1) for number in range(8)])
            print(f"{way}: judged after {time.monotonic() - begun:.0f} s", flush=True)
            figures = figures_of(ledger, judgement, left, crowd, bounds)
            for name, value in figures.items():
                print(f"  {name}: {value:,.6g}")
            for error in ledger.errors[:20]:
                print("  !", error)
            verdict = judgement.verdict
            clean &= not (ledger.lost or ledger.errors or verdict.wrong or verdict.ended_wrong)
            path = RESULTS / "soak.json"
            others = json.loads(path.read_text(encoding="utf-8"))["figures"] if path.exists() else {}
            print(f"written: {write('soak', {**others, way: figures})}", flush=True)
    sys.exit(0 if clean else 1)


def figures_of(
    ledger: Ledger, judgement: Judgement, left: dict[str, float], crowd: Crowd, bounds: Bounds
) -> dict[str, float]:
    counts, verdict = ledger.counts, judgement.verdict
    return {
        "seconds": bounds.seconds,
        "adapters in the store": crowd.count,
        "adapters in use": len(ledger.used),
        "adapters that there is room for": FIT,
        "requests": counts["requests"],
        "finished": counts["stop"] + counts["length"],
        "cancelled": counts["cancelled"],
        "refused (429)": counts["refused"],
        "overtaken by a new version": counts["overtaken"],
        "publishes": counts["publishes"],
        "loads by hand": counts["loads by hand"],
        "loads by hand without room": counts["loads by hand without room"],
        "unloads by hand": counts["unloads by hand"],
        "tokens": counts["tokens"],
        "lost requests": ledger.lost,
        "faults": counts["faults"],
        "answers judged": verdict.requests,
        "tokens judged": verdict.tokens,
        "wrong tokens": verdict.wrong,
        "answers that ended wrong": verdict.ended_wrong,
        "forgiven tokens": verdict.forgiven,
        "largest forgiven difference": verdict.worst,
        "log-probabilities judged": verdict.scored,
        "their largest difference": verdict.off,
        "answers further off than 1e-3, held against their rounding": verdict.shaken,
        "largest bound": verdict.bound,
        "answers judged by a wrong adapter": judgement.controls,
        "of these found out": judgement.apart,
        **left,
    }


if __name__ == "__main__":
    main()
