"""A job under fire: faults drawn by seed hit a run, and what it leaves is compared with that of an undisturbed run.

    python benchmarks/chaos.py --images 20000 --cards 8 --faults 100 --seed 1

Cards are simulated; all else is real: Ray, its processes, signals, files. The driver is a process of its own, started
again with the same command whenever it ended. Rows that raise, kill or hang are part of the job in both runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

KINDS = {"kill card": 6, "stop card": 2, "kill driver": 3, "terminate driver": 1, "tear manifest": 1}
"""The faults, and how often each is drawn relative to the others."""


@dataclass
class Chaos:
    """One run under fire.

    Args:
        home: where prompts and outputs go.
        images: of the whole job.
        cards: simulated ones.
        batch_seconds: what a card takes for 8 images.
        limit: seconds after which a card that does not move is given up.
        bad_rows: how many rows raise, kill their process, or hang.
        kinds: of faults to draw from.
    """

    home: Path
    images: int
    cards: int
    batch_seconds: float
    limit: float
    bad_rows: int
    kinds: list[str]
    rng: random.Random
    session: str = ""
    done: Counter[str] = field(default_factory=Counter)
    retries: int = 0
    starts: int = 0

    def command(self, output: str) -> list[str]:
        """The job as a user would start it."""
        rows = self.rng_rows()
        simulated = {"raise-rows": rows[0::3], "kill-rows": rows[1::3], "hang-rows": rows[2::3]}
        flags = [f"--simulated.{name}={json.dumps(value)}" for name, value in simulated.items()]
        limits = [f"--limits.{name}={self.limit}" for name in ("first-batch", "batch", "answer")]
        return [
            *(sys.executable, "-m", "gaudi_batch", "run", "--device", "simulated", "--cards", str(self.cards)),
            *("--prompts", str(self.home / "prompts.parquet"), "--output", str(self.home / output)),
            *("--shard-size", "64", f"--simulated.batch-seconds={self.batch_seconds}", "--grace", "2"),
            *flags,
            *limits,
        ]

    def rng_rows(self) -> list[int]:
        """The rows that can't be made, the same in every call."""
        return sorted(random.Random(7).sample(range(self.images), self.bad_rows))

    def prepare(self) -> None:
        """Writes the prompts, in two files."""
        prompts = [f"prompt {row}" for row in range(self.images)]
        pq.write_table(pa.table({"prompt": prompts}), self.home / "prompts.parquet", row_group_size=1000)

    def undisturbed(self) -> float:
        """Runs the job without faults; returns its seconds."""
        started = time.monotonic()
        result = subprocess.run(self.command("calm"), capture_output=True, text=True, check=False)
        if result.returncode not in (0, 3):
            raise SystemExit(f"the undisturbed run ended with {result.returncode}: {result.stderr[-2000:]}")
        return time.monotonic() - started

    def under_fire(self, faults: int, over: float) -> float:
        """Runs the job with faults at random moments of the first `over` seconds; returns its seconds."""
        output = self.home / "fire"
        kinds = self.rng.choices(self.kinds, [KINDS[kind] for kind in self.kinds], k=faults)
        moments = sorted(self.rng.uniform(0, over) for _ in range(faults))
        plan = list(zip(moments, kinds, strict=True))
        log = (self.home / "fire.log").open("w")
        started = time.monotonic()
        driver: subprocess.Popen[str] | None = None
        while True:
            if driver is None:
                self.starts += 1
                driver = subprocess.Popen(self.command("fire"), stderr=log, stdout=log, text=True)
            if driver.poll() is not None:
                self._count_retries(output)
                if driver.returncode in (0, 3):
                    self.done["not fired, the run was over"] += len(plan)
                    return time.monotonic() - started
                # SIGTERM itself ends a driver that was so young that it had not yet said what SIGTERM means to it.
                if driver.returncode not in (1, 130, -signal.SIGKILL, -signal.SIGTERM):
                    raise SystemExit(f"the driver ended with {driver.returncode}; see {log.name}")
                driver = None
                continue
            if plan and time.monotonic() - started >= plan[0][0] and self._fire(plan[0][1], driver, output):
                self.done[plan.pop(0)[1]] += 1
            time.sleep(0.02)

    def _fire(self, kind: str, driver: subprocess.Popen[str], output: Path) -> bool:
        """Brings a fault about, unless there is nothing yet for it to hit."""
        cards = card_processes(self.session)
        manifests = sorted((output / "manifest").glob("*.parquet"))
        if ("card" in kind and not cards) or (kind == "tear manifest" and not manifests):
            return False
        with contextlib.suppress(ProcessLookupError):
            if kind == "kill card":
                os.kill(self.rng.choice(cards), signal.SIGKILL)
            elif kind == "stop card":
                os.kill(self.rng.choice(cards), signal.SIGSTOP)
            elif kind == "kill driver":
                driver.kill()
                driver.wait()
            elif kind == "terminate driver":
                driver.terminate()
                driver.wait()
            else:
                # A manifest that was written in part can only be there once its writer is dead.
                driver.kill()
                driver.wait()
                torn = self.rng.choice(manifests)
                torn.write_bytes(torn.read_bytes()[: self.rng.randrange(200)])
        return True

    def _count_retries(self, output: Path) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.retries += json.loads((output / "progress.json").read_text())["retries"]

    def compare(self) -> dict[str, Any]:
        """What the run under fire lost or did twice."""
        calm, fire = (pq.read_table(self.home / name / "manifest.parquet").to_pylist() for name in ("calm", "fire"))
        expected = {(row["row"], row["image_index"]): (row["status"], row["sha256"]) for row in calm}
        found = Counter((row["row"], row["image_index"]) for row in fire)
        wrong = [
            row for row in fire if expected.get((row["row"], row["image_index"])) != (row["status"], row["sha256"])
        ]
        there = {str(path.relative_to(self.home / "fire")) for path in (self.home / "fire/images").rglob("*.png")}
        named = {row["path"] for row in fire if row["path"]}
        return {
            "images": sum(row["status"] == "ok" for row in fire),
            "failed_rows": sum(row["status"] == "failed" for row in fire),
            "images lost": len(expected.keys() - found.keys()),
            "images twice": sum(count - 1 for count in found.values()),
            "rows wrong": len(wrong),
            "files missing": len(named - there),
            "files that nobody names": len(there - named),
        }


def card_processes(session: str) -> list[int]:
    """Process ids of the cards of a Ray session that are neither dead nor stopped."""
    cards: dict[int, int] = {}
    raylets: set[int] = set()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = entry.joinpath("cmdline").read_bytes()
            state, parent = entry.joinpath("stat").read_text().rpartition(")")[2].split()[:2]
            if command.startswith(b"ray::Card") and state not in "TZ":
                cards[int(entry.name)] = int(parent)
            elif b"raylet" in command.partition(b"\0")[0] and session.encode() in command:
                raylets.add(int(entry.name))
    return sorted(card for card, parent in cards.items() if parent in raylets)


def main() -> None:
    """Runs the job calm and under fire, and prints what came of it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--cards", type=int, default=8)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--bad-rows", type=int, default=9, help="rows that raise, kill or hang, in both runs")
    parser.add_argument("--only", action="append", choices=list(KINDS), help="draw from these faults alone")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch-seconds", type=float, default=0.2, help="0.885 is that of a Gaudi2")
    parser.add_argument("--limit", type=float, default=5.0, help="seconds after which a card counts as hung")
    parser.add_argument("--home", type=Path, help="where prompts, outputs and the log go (default: a new directory)")
    arguments = parser.parse_args()
    home = arguments.home or Path(tempfile.mkdtemp(prefix="chaos-"))
    home.mkdir(parents=True, exist_ok=True)
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    chaos = Chaos(
        home,
        arguments.images,
        arguments.cards,
        arguments.batch_seconds,
        arguments.limit,
        arguments.bad_rows,
        arguments.only or list(KINDS),
        random.Random(arguments.seed),
    )
    chaos.prepare()
    import ray  # reads the token when it is imported

    context = ray.init(
        address="local",
        resources={"HPU": arguments.cards},
        num_cpus=os.cpu_count(),
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=100 * 1024**2,
    )
    chaos.session = context.address_info["session_dir"]
    os.environ["RAY_ADDRESS"] = context.address_info["gcs_address"]
    try:
        calm = chaos.undisturbed()
        fire = chaos.under_fire(arguments.faults, calm * 1.5)
        outcome = chaos.compare()
    finally:
        ray.shutdown()
    fired = sum(count for kind, count in chaos.done.items() if kind in KINDS)
    facts = {
        "seed": arguments.seed,
        "faults": dict(chaos.done),
        "drivers started": chaos.starts,
        **outcome,
        "shards done again": chaos.retries,
        "shards done again per fault": round(chaos.retries / max(1, fired), 2),
        "seconds undisturbed": round(calm, 1),
        "seconds under fire": round(fire, 1),
    }
    print(json.dumps(facts, indent=1))
    harm = ("images lost", "images twice", "rows wrong", "files missing", "files that nobody names")
    sys.exit(any(outcome[name] for name in harm))


if __name__ == "__main__":
    main()
