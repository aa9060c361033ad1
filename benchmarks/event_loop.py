"""How long the driver's event loop is held while many simulated cards start on this machine.

A task of the same loop ticks every 10 ms; what is measured is by how much its ticks come late, until all cards have
loaded. On a machine with few cores a part of that is the operating system's, which has the cards' processes to start.

    python benchmarks/event_loop.py --cards 64
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from gaudi_batch import JobConfig, run
from gaudi_batch.driver.loop import Driver
from gaudi_batch.errors import RunStopped
from gaudi_batch.scheduling.events import StopForced

TICK_S = 0.01


def main() -> None:
    """Starts the cards and prints how late the ticks came."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cards", type=int, default=64)
    cards = parser.parse_args().cards
    late: list[float] = []
    drive = Driver.run

    async def tick(driver: Driver) -> None:
        last = time.monotonic()
        while True:
            await asyncio.sleep(TICK_S)
            now = time.monotonic()
            late.append(now - last - TICK_S)
            last = now
            if sum(slot.up for slot in driver.fleet.slots.values()) == cards:
                driver.tell(StopForced("all cards have loaded"))

    async def drive_and_tick(driver: Driver) -> str | None:
        ticking = asyncio.create_task(tick(driver))
        try:
            return await drive(driver)
        finally:
            ticking.cancel()

    Driver.run = drive_and_tick  # type: ignore[assignment, method-assign]
    with tempfile.TemporaryDirectory() as directory:
        prompts = Path(directory, "prompts.parquet")
        pq.write_table(pa.table({"prompt": ["a prompt"] * (400 * cards)}), prompts)
        job = JobConfig(
            prompts=str(prompts),
            output=f"{directory}/out",
            device="simulated",
            simulated={"batch_seconds": 5.0},
        )
        ray.init(
            address="local", num_cpus=cards, resources={"HPU": cards}, include_dashboard=False, log_to_driver=False
        )
        started = time.monotonic()
        try:
            run(job)
        except RunStopped as stopped:
            print(f"{stopped} after {time.monotonic() - started:.1f} s")
    late.sort(reverse=True)
    print(f"{len(late)} ticks; the latest by {', '.join(f'{1000 * seconds:.0f}' for seconds in late[:5])} ms")


if __name__ == "__main__":
    main()
