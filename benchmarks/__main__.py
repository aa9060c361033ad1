"""Runs benchmarks, stores what they measure in benchmarks/results, and writes the tables of docs/performance.md.

    python -m benchmarks                        # all, three times each
    python -m benchmarks defaults --repeat 1
    python -m benchmarks --render               # the tables alone, from the results that are there

Each by itself, in other sizes: `python -m benchmarks.defaults --help`, and so on.
"""

from __future__ import annotations

import argparse
import sys

from benchmarks import (
    defaults,
    formats,
    idle,
    loading,
    memory,
    one_card,
    ray_data,
    reading,
    report_page,
    resuming,
    schedule,
    small_images,
)
from benchmarks.report import update_page

MODULES = (
    defaults,
    ray_data,
    schedule,
    one_card,
    reading,
    resuming,
    small_images,
    formats,
    loading,
    idle,
    memory,
    report_page,
)
BENCHMARKS = [module.BENCHMARK for module in MODULES]


def main() -> None:
    """See the module; exit code 1 if a case failed."""
    names = [benchmark.name for benchmark in BENCHMARKS]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(names)}")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each case")
    parser.add_argument("--render", action="store_true", help="measure nothing")
    options = parser.parse_args()
    if unknown := set(options.names).difference(names):
        parser.error(f"no benchmark is named {', '.join(sorted(unknown))}; those are {', '.join(names)}")
    well = True
    for benchmark in () if options.render else BENCHMARKS:
        if benchmark.name in (options.names or names):
            well &= benchmark.run(options.repeat)
            update_page(BENCHMARKS)
    update_page(BENCHMARKS)
    sys.exit(not well)


if __name__ == "__main__":
    main()
