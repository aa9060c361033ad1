"""How much of the cards' time a job uses that sets nothing: `gaudi-batch run` with its defaults, on simulated cards.

    python -m benchmarks.defaults --cards 4 --prompts 320
    python -m benchmarks.defaults --cards 4 --hang
    python -m benchmarks.defaults --cards 6 --planned-on 2

A simulated card sleeps for as long as a Gaudi 2 takes for a batch. All else is real: Ray, one process a card, the
files. The best possible end is that of a scheduler that loses no time and gives the next batch to the card that is free
first, counted from when each card was ready. What a run takes longer than that is told in batches: each card could have
made so many more.
"""

from __future__ import annotations

import argparse
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from benchmarks.harness import (
    BATCH_S,
    BATCH_SIZE,
    FIGURES,
    Command,
    RayStarted,
    figures,
    ray_started,
    read_batches,
    ready_times,
    run_command,
    scratch,
    write_prompts,
)
from benchmarks.report import Benchmark, Row, size_flags

BATCHES = 40
"""Of each card, where a case names no number of prompts: some 35 s of work."""
BATCHES_BEFORE_STOP = 10
"""Of each card that a run has made when it is stopped, to be resumed on more cards."""
HANG_TRIES = 4
"""Runs until the card that is stopped had a shard in flight."""
INTERVAL_S = 0.03
INTERRUPTED = 130


@dataclass(frozen=True)
class Case:
    """What is run."""

    cards: int
    prompts: int
    shapes: int = 1
    hang: bool = False
    """Whether one card's process is stopped once no shard is left but those that are in flight."""
    planned_on: int = 0
    """Cards on which the run begins before it is stopped and resumed on `cards`."""
    longer: int = 1
    """How many times as long as a batch of Stable Diffusion 2 each batch takes."""

    def __str__(self) -> str:
        cards = f"{self.cards} card{'' if self.cards == 1 else 's'}"
        text = f"{self.prompts:,} prompts, {cards}"
        if self.planned_on:
            text = f"{self.prompts:,} prompts, planned on {self.planned_on}, resumed on {cards}"
        return (
            text
            + ", two shapes" * (self.shapes > 1)
            + ", one hangs at the end" * self.hang
            + f", batches of {self.batch_s:.2f} s" * (self.longer > 1)
        )

    @property
    def batch_s(self) -> float:
        """Seconds that a batch takes."""
        return BATCH_S * self.longer


CASES = [
    Case(8, 200),
    Case(16, 5_120),
    Case(64, 20_000),
    Case(64, 20_000, longer=4),
    *(Case(cards, cards * BATCHES * BATCH_SIZE, shapes=2) for cards in (1, 8, 64)),
    Case(8, 8 * BATCHES * BATCH_SIZE, hang=True),
    Case(20, 20 * BATCHES * BATCH_SIZE, planned_on=2),
]


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """The figures of each case."""
    for case in cases(options):
        with scratch() as home:
            prompts = write_prompts(home / "prompts.parquet", case.prompts, case.shapes)
            yield str(case), measure_hang(case, home, prompts) if case.hang else measure_case(case, home, prompts)


def cases(options: argparse.Namespace) -> list[Case]:
    """The benchmark's own cases, or the one that the flags ask for."""
    if not options.cards:
        return CASES
    prompts = options.prompts or options.cards * BATCHES * BATCH_SIZE
    return [Case(options.cards, prompts, options.shapes, options.hang, options.planned_on)]


def measure_case(case: Case, home: Path, prompts: Path) -> dict[str, float]:
    """One run, or one that is resumed, of which the second command counts."""
    output = home / "output"
    if case.planned_on:
        with ray_started(home / "few", case.planned_on) as cluster:
            begin_and_stop(run_command(prompts, output, cluster.address), output, case.planned_on)
    flags = ("--simulated.batch-seconds", str(case.batch_s)) if case.longer > 1 else ()
    with ray_started(home, case.cards) as cluster, run_command(prompts, output, cluster.address, *flags) as command:
        command.wait()
    return figures_of(command, output, case.cards)


def figures_of(command: Command, output: Path, cards: int) -> dict[str, float]:
    """The figures of what a command made, from what is stored and from its log."""
    batches = [batch for batch in read_batches(output) if batch.stored > command.started]
    return figures(batches, ready_times(batches, command.log), cards, command)


def begin_and_stop(command: Command, output: Path, cards: int) -> None:
    """Runs a command until some batches are committed, and stops it as Ctrl-C does."""
    with command:
        while committed(output) < 1 or len(read_batches(output)) < cards * BATCHES_BEFORE_STOP:
            if command.process.poll() is not None:
                break
            time.sleep(1)
        command.process.send_signal(signal.SIGINT)
        command.wait(INTERRUPTED)


def measure_hang(case: Case, home: Path, prompts: Path) -> dict[str, float]:
    """A run of which a card stands still when the last shards are in flight. A stopped card that had none costs nothing
    and shows nothing: such a run is made again."""
    for number in range(HANG_TRIES):
        place = home / str(number)
        place.mkdir()
        output = place / "output"
        with ray_started(place, case.cards) as cluster, run_command(prompts, output, cluster.address) as command:
            stop_one_card(cluster, command, output, case.cards)
            command.wait()
        backups = command.mentions("takes longer than it should")
        if backups:
            return figures_of(command, output, case.cards) | {"backups": float(backups)}
    raise RuntimeError(f"in {HANG_TRIES} runs the card that was stopped had no shard in flight")


def stop_one_card(cluster: RayStarted, command: Command, output: Path, cards: int) -> None:
    """Sends SIGSTOP to one card's process once no more shards are left than there are cards."""
    plan = output / "plan.parquet"
    while command.process.poll() is None:
        if plan.exists() and pq.read_metadata(plan).num_rows - committed(output) <= cards:
            os.kill(cluster.cards()[0], signal.SIGSTOP)
            return
        time.sleep(INTERVAL_S)


def committed(output: Path) -> int:
    """Shards that are committed."""
    return sum(1 for _ in output.glob("manifest/*.parquet"))


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of one case."""
    size_flags(parser)
    parser.add_argument("--shapes", type=int, default=1, help="of images, 1 or 2")
    parser.add_argument(
        "--hang", action="store_true", help="stop one card's process when the last shards are in flight"
    )
    parser.add_argument("--planned-on", type=int, default=0, help="cards on which the run begins before it is resumed")


COLUMNS = FIGURES | {"backups": ("backup attempts", ".0f")}
BENCHMARK = Benchmark("defaults", __doc__, COLUMNS, measure, add_flags)

if __name__ == "__main__":
    BENCHMARK.alone()
