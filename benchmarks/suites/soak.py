"""Thousands of adapters for minutes, at random; then every answer is computed again alone, and must have the same bits.

    python -m benchmarks soak [--only engine http] [--seconds 180] [--adapters 2000] [--seed 0]

SmolLM2-135M in float32; each adapter has weights of its own, of rank 2 to 16, on layers of its own; Zipf 1.5. There
is room for sixteen adapters, for keys and values of a few rows, and for few waiting requests. Many clients send random
requests: for adapters, versions, scales, blends, the base; greedy and with seeds; with prompts that share prefixes; and
some go away in the middle. Meanwhile adapters are loaded, unloaded and published.
"""

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.figures import PERCENT, Figure, Suite, Table
from benchmarks.harness import Run, parser
from benchmarks.soak import engine, server
from benchmarks.soak.catalogue import Catalogue
from benchmarks.soak.engine import Limits
from benchmarks.soak.judge import Judgement, judge_all
from benchmarks.soak.requests import Ledger
from loradeck import Base
from loradeck.base.load import SMOLLM2
from loradeck.base.onednn import cap_kernel_cache
from loradeck.serve.config import EngineConfig

ROOM = 16  # adapters of average size that fit
KV_CACHE_BYTES = 130_000_000  # twenty-two rows of 128 tokens, in float32
PARTS = {"engine": engine.soak, "http": server.soak}

SUITE = Suite(
    "soak",
    "Soak",
    "SmolLM2-135M, float32, everything at random",
    (
        Table(
            "What happened, and what is left",
            ("{column}", "{row}"),
            (
                Figure("seconds", "duration", "s"),
                Figure("adapters in the store", target="≥ 2000"),
                Figure("adapters that there is room for", "adapters that fit"),
                Figure("finished", "requests answered whole"),
                Figure("cancelled", "requests cancelled by the client"),
                Figure("refused (429)", "requests refused (429)"),
                Figure("overtaken by a new version", "requests whose adapter got a newer version meanwhile"),
                Figure("loads by hand", "loads through the API"),
                Figure("loads by hand without room", "loads through the API refused for lack of room"),
                Figure("unloads by hand", "unloads through the API"),
                Figure("lost requests", target="= 0"),
                Figure("faults", target="= 0"),
                Figure("tokens judged", "tokens compared with the request alone"),
                Figure("log-probabilities judged", "log-probabilities of these"),
                Figure("wrong tokens", target="= 0"),
                Figure("answers that ended wrong", "answers that ended at the wrong token", target="= 0"),
                Figure("answers judged by a wrong adapter"),
                Figure("of these found out", "of these found wrong"),
                Figure("prompt tokens found in the prefix cache", "prompt tokens in the prefix cache", PERCENT),
                Figure(
                    "memory at the end / after warm-up", "memory at the end, relative to after warm-up", "×", "≤ 1.05"
                ),
                Figure("left: pins", "left: pinned adapters", target="= 0"),
                Figure("left: requests", "left: requests", target="= 0"),
                Figure("left: bytes of rows", "left: KV cache of requests", "bytes", "= 0"),
                Figure("left: rows, over the budget", "left: KV cache, share of its budget", PERCENT),
                Figure("left: bytes of prefixes, over the budget", "left: prefix cache, share of its budget", PERCENT),
                Figure("left: bytes of adapters, over the budget", "left: adapters, share of their budget", PERCENT),
                Figure("left: adapters that nothing knows", "left: adapters without an owner", target="= 0"),
                Figure("left: lines in the server's log", "lines in the server's log"),
                Figure("after closing: bytes of the cache", "after closing: KV cache", "bytes", "= 0"),
                Figure("after closing: adapters in memory", target="= 0"),
                Figure("SIGTERM: answers on their way", "SIGTERM: requests accepted"),
                Figure("SIGTERM: of these whole", "SIGTERM: of these answered whole"),
                Figure("SIGTERM: seconds to the end", "SIGTERM: time to the end", "s"),
                Figure("SIGTERM: exit status", target="= 0"),
            ),
        ),
    ),
    """
- Clients request adapters (Zipf 1.5), versions, scales, blends of three and the base, greedily and with seeds, with
  prompts that share prefixes, and some go away in the middle; adapters are loaded, unloaded and published meanwhile.
  Sixteen adapters fit. Each has weights of its own.
- *wrong*: not the token that the request gets alone, in one step over its whole text, or not its log-probability: all
  bits must be the same, greedily and by the seed. Cancelled answers are judged as far as they came.
- *judged by a wrong adapter*: a fifth of the answers, to see that a leak would be found.
- *http*: a `loradeck serve` process, openai's client, and SIGTERM while it answers.
- *after warm-up*: a quarter of the time. Figures around a moment are means over a tenth of the time.
""",
    by_capability=False,
)


def main(arguments: Sequence[str]) -> None:
    options = parser(SUITE, __doc__, parts=[*PARTS])
    options.add_argument("--seconds", type=float, default=180.0, help="of each part")
    options.add_argument("--adapters", type=int, default=2000)
    options.add_argument("--clients", type=int, default=28)
    options.add_argument("--seed", type=int, default=0)
    run = Run(SUITE, options, arguments)
    cap_kernel_cache()  # as `loradeck serve` does
    seconds, count, clients = run.options.seconds, run.options.adapters, run.options.clients
    base = Base.load(SMOLLM2, dtype="float32")
    clean = True
    with tempfile.TemporaryDirectory() as folder:
        begin = time.monotonic()
        catalogue = Catalogue(base.model, Path(folder), count)
        sizes = [catalogue.store.find(f"a{number}").facts.nbytes for number in range(min(200, count))]
        print(f"{count} adapters after {time.monotonic() - begin:.0f} s", flush=True)
        config = EngineConfig(
            max_step_tokens=128,
            kv_cache_bytes=KV_CACHE_BYTES,
            adapter_bytes=ROOM * sum(sizes) // len(sizes),
            max_waiting=max(1, clients - 20),
            patience=0.5,
        )
        limits = Limits(seconds, clients, max_prompt=140, max_tokens=24, pause=0.5, config=config)
        for part in run.options.only:
            ledger, figures = PARTS[part](base, catalogue, limits, run.options.seed)
            print(f"{part}: {len(ledger.answers)} answers to judge", flush=True)
            others = [catalogue.folder(f"a{number}", 1) for number in range(8)]
            judgement = judge_all(base, catalogue.store, ledger.answers, others)
            run.add(part, figures_of(ledger, judgement, catalogue, limits) | figures)
            for error in ledger.errors[:20]:
                print("  !", error)
            verdict = judgement.verdict
            clean &= not (ledger.lost or ledger.errors or verdict.wrong or verdict.ended_wrong)
    run.end()
    sys.exit(0 if clean else 1)


def figures_of(ledger: Ledger, judgement: Judgement, catalogue: Catalogue, limits: Limits) -> dict[str, float]:
    counts, verdict = ledger.counts, judgement.verdict
    return {
        "seconds": limits.seconds,
        "adapters in the store": catalogue.count,
        "adapters in use": len(ledger.used),
        "adapters that there is room for": ROOM,
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
        "log-probabilities judged": verdict.logprobs,
        "answers judged by a wrong adapter": judgement.controls,
        "of these found out": judgement.detected,
    }
