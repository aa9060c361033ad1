"""The results of benchmarks as JSON, and the tables of docs/performance.md made of them."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks/results"
PAGE = REPOSITORY / "docs/performance.md"
_TABLE = re.compile(r"(<!-- begin (\w+) -->\n).*?(<!-- end \2 -->)", re.DOTALL)

Row = tuple[str, Mapping[str, float]]
"""A case in words, and its figures of one run."""


@dataclass(frozen=True)
class Benchmark:
    """One benchmark, whose results are in `results/<name>.json`.

    Args:
        name: of the results and of the table.
        about: its module's docstring.
        columns: what the table shows: a figure, its heading, and how it is written, as in `format`.
        measure: runs all cases once and yields the figures of each as soon as they are known.
        add_flags: adds the flags by which one case of another size is measured alone.
    """

    name: str
    about: str | None
    columns: Mapping[str, tuple[str, str]]
    measure: Callable[[argparse.Namespace], Iterable[Row]]
    add_flags: Callable[[argparse.ArgumentParser], object]

    def parser(self) -> argparse.ArgumentParser:
        """The parser of the benchmark by itself."""
        parser = argparse.ArgumentParser(
            prog=f"python -m benchmarks.{self.name}",
            description=self.about,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.add_flags(parser)
        return parser

    def alone(self) -> None:
        """Runs it once as the command line says, and prints the figures; stores nothing."""
        for case, figures in self.measure(self.parser().parse_args()):
            print(json.dumps({"case": case, "figures": rounded(figures)}), flush=True)

    def run(self, repeat: int, directory: Path = RESULTS) -> bool:
        """Runs all cases so many times, and stores the figures after each case; returns whether all went well. A case
        that fails ends its round; the next one begins with the first case again."""
        results: dict[str, Any] = {"benchmark": self.name, "machine": machine(), "rows": []}
        well = True
        for _ in range(repeat):
            try:
                for case, figures in self.measure(self.parser().parse_args([])):
                    results["rows"].append({"case": case, "figures": rounded(figures)})
                    store(results, directory)
                    print(f"{self.name}: {case}: {json.dumps(results['rows'][-1]['figures'])}", flush=True)
            except Exception:
                traceback.print_exc()
                well = False
        return well


def size_flags(parser: argparse.ArgumentParser) -> None:
    """Adds --cards and --prompts, which replace a benchmark's own cases by one."""
    parser.add_argument("--cards", type=int, help="measure one case, on so many cards")
    parser.add_argument("--prompts", type=int, help="of that case (default: 40 batches a card)")


def rounded(figures: Mapping[str, float]) -> dict[str, float]:
    """Figures with the digits that mean something."""
    return {name: round(value, 4) for name, value in figures.items()}


def machine() -> dict[str, Any]:
    """What figures depend on; nothing that names the machine."""
    with Path("/proc/meminfo").open() as memory:
        kilobytes = int(memory.readline().split()[1])
    return {
        "cores": os.cpu_count(),
        "memory_gb": round(kilobytes / 1024**2),
        "load_before": round(os.getloadavg()[0], 1),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "python": platform.python_version(),
        **{package: version(package) for package in ("gaudi-batch", "ray", "pyarrow")},
    }


def store(results: Mapping[str, Any], directory: Path = RESULTS) -> None:
    """Writes the results of a benchmark."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{results['benchmark']}.json").write_text(json.dumps(results, indent=1) + "\n")


def table(results: Mapping[str, Any], columns: Mapping[str, tuple[str, str]]) -> str:
    """Results as a Markdown table: the median of the runs, and the smallest and the largest figure."""
    cases: dict[str, list[Mapping[str, float]]] = {}
    for row in results["rows"]:
        cases.setdefault(row["case"], []).append(row["figures"])
    present = {name: column for name, column in columns.items() if any(name in runs[0] for runs in cases.values())}
    lines = [
        "",
        "| | " + " | ".join(heading for heading, _ in present.values()) + " |",
        "| --- |" + " ---: |" * len(present),
    ]
    for case, runs in cases.items():
        cells = [_cell([run[name] for run in runs if name in run], how) for name, (_, how) in present.items()]
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", _measured(results["machine"], {len(runs) for runs in cases.values()}), ""])


def _cell(values: list[float], how: str) -> str:
    if not values:
        return "-"
    low, middle, high = (format(value, how) for value in (min(values), statistics.median(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


def _measured(on: Mapping[str, Any], runs: set[int]) -> str:
    count = " or ".join(map(str, sorted(runs)))
    what = f"gaudi-batch {on['gaudi-batch']}, Python {on['python']}, Ray {on['ray']}, pyarrow {on['pyarrow']}"
    where = f"{on['cores']} cores, {on['memory_gb']} GB of memory, load of {on['load_before']} before"
    return f"{count} run{'' if runs == {1} else 's'} of each, {on['date']}; {where}; {what}."


def render(page: str, benchmarks: Iterable[Benchmark], directory: Path = RESULTS) -> str:
    """The page with the tables that stand between `<!-- begin NAME -->` and `<!-- end NAME -->` made anew; all else is
    kept. Raises KeyError for a table of no benchmark."""
    known = {benchmark.name: benchmark for benchmark in benchmarks}

    def replace(match: re.Match[str]) -> str:
        columns, path = known[match[2]].columns, directory / f"{match[2]}.json"
        body = table(json.loads(path.read_text()), columns) if path.exists() else "\nNot measured yet.\n"
        return f"{match[1]}{body}\n{match[3]}"

    return _TABLE.sub(replace, page)


def update_page(benchmarks: Iterable[Benchmark]) -> None:
    """Writes docs/performance.md with the tables of all results."""
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8"), benchmarks), encoding="utf-8")
