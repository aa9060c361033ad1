"""What benchmarks make of a run's records, and the tables that they write."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.__main__ import BENCHMARKS
from benchmarks.harness import batches_needed, best_end, figures, read_batches, ready_times
from benchmarks.idle import idle_share
from benchmarks.report import PAGE, Benchmark, machine, render, store

START = 1_800_000_000.0  # 2027-01-15T08:00:00Z
COLUMNS = {"wall_s": ("wall, s", ".1f"), "share": ("device time", ".0%"), "never": ("never measured", ".1f")}
PROSE = """# Title

By hand.
<!-- begin small -->
old
<!-- end small -->
More.

<!-- begin other -->
<!-- end other -->
"""


def write_output(output: Path, cards: dict[str, list[tuple[float, float, int]]]) -> None:
    """Throughput files of cards, each with a shard a batch: seconds from `START` until it was stored, seconds that the
    device waited before it, and its images. A batch takes a second."""
    for card, batches in cards.items():
        (output / "throughput" / card).mkdir(parents=True)
        for number, (stored, wait_s, images) in enumerate(batches):
            whole, milliseconds = divmod(round(stored * 1000), 1000)
            line = {
                "card": card,
                "time": f"2027-01-15T08:00:{whole:02d}.{milliseconds:03d}+00:00",
                "bucket": {"width": 64, "height": 64, "steps": 50, "guidance_scale": 7.5},
                "images": images,
                "generate_s": 1.0,
                "wait_s": wait_s,
            }
            (output / "throughput" / card / f"{number:06d}-abc.jsonl").write_text(json.dumps(line) + "\n")


def benchmark(name: str) -> Benchmark:
    return Benchmark(name, "", COLUMNS, lambda _: [], lambda _: None)


def results(*rows: tuple[str, dict[str, float]]) -> dict[str, Any]:
    return {"benchmark": "small", "machine": machine(), "rows": [{"case": c, "figures": f} for c, f in rows]}


@pytest.mark.parametrize(
    ("ready", "batches", "end"), [([0], 3, 3), ([0, 0], 3, 2), ([0, 2.5], 3, 3), ([0, 2.5], 4, 3.5), ([0, 9], 3, 3)]
)
def test_the_best_possible_end_gives_each_batch_to_the_card_that_is_free_first(
    ready: list[float], batches: int, end: float
) -> None:
    assert best_end(ready, batches, 1.0) == end


def test_the_figures_of_a_stored_output_are_right(tmp_path: Path) -> None:
    # Two cards, ready after 2 and 4 s; five batches of 36 images; the second card waits for a second before its last.
    write_output(tmp_path, {"a": [(3, 0, 8), (4, 0, 8), (5, 0, 8)], "b": [(5.5, 0.5, 8), (7.5, 1.0, 4)]})
    batches = read_batches(tmp_path)
    log = [(START + 4.6, "10:00:04 card b (node n, module 1) is ready after 1.0 s"), (START, "something else")]
    ready = ready_times(batches, log)
    assert {card: at - START for card, at in ready.items()} == {"a": 2, "b": 4}
    assert batches_needed(batches) == 5
    command: Any = SimpleNamespace(started=START, ended=START + 9)
    assert figures(batches, ready, 2, command) == {
        "wall_s": 9,
        "first_batch_s": 3,
        "first_ready_s": 2,
        "last_ready_s": 4,
        "device_share": 5 / (2 * 5.5),
        "excess_batches": 1.5,  # at best four batches have ended after 5 s, and the fifth after 6
        "end_s": 1.5,
    }
    assert idle_share(batches) == pytest.approx(1 / 6), "what a card waits for before its first batch is no idling"


def test_a_card_that_made_nothing_is_ready_when_the_log_says_so(tmp_path: Path) -> None:
    write_output(tmp_path, {"a": [(3, 0, 8)]})
    ready = ready_times(read_batches(tmp_path), [(START + 1, "card b (node n) is ready after 1.0 s")])
    assert {card: at - START for card, at in ready.items()} == {"a": 2, "b": 1}


def test_tables_are_replaced_and_prose_is_kept(tmp_path: Path) -> None:
    rows = [("one", {"wall_s": wall, "share": 0.5}) for wall in (3.0, 1.0, 2.0)] + [("two", {"wall_s": 7.0})]
    store(results(*rows), tmp_path)
    page = render(PROSE, [benchmark("small"), benchmark("other")], tmp_path)
    assert page.startswith("# Title\n\nBy hand.\n<!-- begin small -->\n")
    assert "<!-- end small -->\nMore.\n\n<!-- begin other -->" in page
    assert "old" not in page
    assert "| | wall, s | device time |\n| --- | ---: | ---: |\n" in page
    assert "| one | 2.0 (1.0 to 3.0) | 50% |\n| two | 7.0 | - |\n" in page
    assert "1 or 3 runs of each" in page
    assert "Not measured yet." in page
    assert render(page, [benchmark("small"), benchmark("other")], tmp_path) == page


def test_a_table_of_no_benchmark_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        render(PROSE, [benchmark("small")], tmp_path)


def test_results_are_stored_after_each_case(tmp_path: Path) -> None:
    def measure(_: Any) -> Any:
        yield "one", {"wall_s": 1.0}
        raise RuntimeError("the second case fails")

    broken = Benchmark("small", "", COLUMNS, measure, lambda _: None)
    assert not broken.run(2, tmp_path)
    rows = json.loads((tmp_path / "small.json").read_text())["rows"]
    assert rows == [{"case": "one", "figures": {"wall_s": 1.0}}] * 2


def test_the_page_has_a_table_of_each_benchmark() -> None:
    page = PAGE.read_text()
    for each in BENCHMARKS:
        assert page.count(f"<!-- begin {each.name} -->\n") == 1
        assert page.count(f"<!-- end {each.name} -->\n") == 1


def test_results_do_not_name_the_machine() -> None:
    assert socket.gethostname() not in json.dumps(machine())
