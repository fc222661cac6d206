"""python -m benchmarks SUITE [OPTIONS]: measure something, or write the pages from the results (report)."""

import sys
from importlib import import_module

from loradeck.base.openmp import share_cores

SUITES = (
    "adapters",
    "train",
    "preferences",
    "data",
    "serve",
    "native",
    "base",
    "emulated",
    "ops",
    "busy",
    "quality",
    "soak",
    "peers",
    "four_bits",
    "classify",
    "live",
    "page",
)
USAGE = f"""usage: python -m benchmarks SUITE [OPTIONS]

SUITE is one of {", ".join(SUITES)}: it measures and writes benchmarks/results/SUITE.*.json; --help describes it.
`python -m benchmarks report [--check]` writes the pages from those files."""


def main() -> None:
    name, *arguments = sys.argv[1:] or ["--help"]
    if name == "report":
        import_module("benchmarks.report").main(arguments)
    elif name in SUITES:
        share_cores()  # as the `loradeck` command does
        import_module(f"benchmarks.suites.{name}").main(arguments)
    else:
        print(USAGE)
        sys.exit(0 if name in ("-h", "--help") else 2)


if __name__ == "__main__":
    main()
