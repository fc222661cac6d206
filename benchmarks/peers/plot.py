"""Draws docs/peers.svg from benchmarks/results/peers.json: `python -m benchmarks.peers.plot`."""

import json
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.harness import RESULTS
from benchmarks.peers.process import Case
from benchmarks.peers.workload import ROWS

ADAPTERS = (0, 1, 2, 4, 8, 16)


def main() -> None:
    record = json.loads((RESULTS / "peers.json").read_text(encoding="utf-8"))
    mpl.rcParams["svg.hashsalt"] = "peers"  # equal figures make an equal file
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for system, figures in record["figures"].items():
        rates = [figures[f"{Case(ROWS, adapters)} (tokens/s)"] for adapters in ADAPTERS]
        axes.plot(range(len(ADAPTERS)), rates, marker="o", label=system)
    axes.set_xticks(range(len(ADAPTERS)), ["base", *map(str, ADAPTERS[1:])])
    axes.set_xlabel("different adapters in the batch")
    axes.set_ylabel("tokens per second")
    axes.set_ylim(bottom=0)
    axes.set_title(f"Decoding {ROWS} rows, SmolLM2-135M\n{record['machine']}", fontsize="medium")
    axes.legend()
    path = Path(__file__).parents[2] / "docs" / "peers.svg"
    figure.savefig(path, metadata={"Date": None})
    print(f"written: {path}")


if __name__ == "__main__":
    main()
