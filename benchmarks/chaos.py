"""A job under fire: faults drawn by seed hit a run, and what it leaves is compared with that of an undisturbed run.

    python benchmarks/chaos.py --images 20000 --cards 8 --faults 100 --seed 1 --s3

Cards are simulated; all else is real: Ray, its processes, signals, files, and with --s3 an S3 server behind a proxy
that fails as networks do. The driver is a process of its own, started again with the same command whenever it ended.
Rows that raise, kill or hang are part of the job in both runs.
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
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from faultproxy import Fault, FaultProxy, fault_proxy  # the tests' own server and proxy
from helpers import S3Server, free_port

KINDS = {"kill card": 6, "stop card": 2, "kill driver": 3, "terminate driver": 1, "tear manifest": 1}
"""The faults, and how often each is drawn relative to the others."""
STORAGE_KINDS = {"500": 1, "503": 1, "reset": 1, "lost answer": 1, "cut": 1, "stall": 1, "kill server": 1}
"""Those of storage, each of which lasts."""
SHARD_SIZE = 64
LATER_SECONDS = 4.0
LOOK_SECONDS = 0.1


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
        storage_seconds: how long storage fails each time.
        store: where outputs go.
    """

    home: Path
    images: int
    cards: int
    batch_seconds: float
    limit: float
    bad_rows: int
    kinds: list[str]
    storage_seconds: float
    store: Store
    rng: random.Random
    session: str = ""
    share: float = 0.0
    done: Counter[str] = field(default_factory=Counter)
    retries: int = 0
    starts: int = 0

    def command(self, output: str) -> list[str]:
        """The job as a user would start it."""
        rows = self.rng_rows()
        simulated = {"raise-rows": rows[0::3], "kill-rows": rows[1::3], "hang-rows": rows[2::3]}
        flags = [f"--simulated.{name}={json.dumps(value)}" for name, value in simulated.items()]
        limits = [f"--limits.{name}={self.limit}" for name in ("loading", "first-batch", "batch", "answer")]
        return [
            *(sys.executable, "-m", "gaudi_batch", "run", "--device", "simulated", "--cards", str(self.cards)),
            *("--prompts", str(self.home / "prompts.parquet"), "--output", self.store.url(output)),
            *("--shard-size", str(SHARD_SIZE), f"--simulated.batch-seconds={self.batch_seconds}", "--grace", "2"),
            *self.store.flags,
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

    def under_fire(self, faults: int) -> float:
        """Runs the job with faults all along: each is due at a random share of the work, and up to `LATER_SECONDS`
        after that, so that it may hit a driver that has just begun. Returns the run's seconds."""
        weights = KINDS | STORAGE_KINDS
        kinds = self.rng.choices(self.kinds, [weights[kind] for kind in self.kinds], k=faults)
        waiting = sorted(((self.rng.random(), kind) for kind in kinds), reverse=True)
        due: list[tuple[float, str]] = []
        log = (self.home / "fire.log").open("w")
        started = time.monotonic()
        threading.Thread(target=self._watch, daemon=True).start()
        driver: subprocess.Popen[str] | None = None
        while True:
            if driver is None:
                self.starts += 1
                driver = subprocess.Popen(self.command("fire"), stderr=log, stdout=log, text=True)
            if driver.poll() is not None:
                self._count_retries()
                if driver.returncode in (0, 3):
                    self.done["not fired, the run was over"] += len(waiting) + len(due)
                    return time.monotonic() - started
                # SIGTERM itself ends a driver that was so young that it had not yet said what SIGTERM means to it.
                if driver.returncode not in (1, 130, -signal.SIGKILL, -signal.SIGTERM):
                    raise SystemExit(f"the driver ended with {driver.returncode}; see {log.name}")
                driver = None
                continue
            now = time.monotonic()
            while waiting and waiting[-1][0] <= self.share:
                due.append((now + self.rng.uniform(0, LATER_SECONDS), waiting.pop()[1]))
            for fault in [fault for fault in due if fault[0] <= now]:
                if self._fire(fault[1], driver):
                    self.done[fault[1]] += 1
                    due.remove(fault)
                if driver.poll() is not None:
                    break
            time.sleep(LOOK_SECONDS)

    def _watch(self) -> None:
        """Keeps up how far the run is; a store that is down takes its time to answer."""
        while True:
            self.share = max(self.share, len(self.store.find("fire/manifest")) * SHARD_SIZE / self.images)
            time.sleep(LOOK_SECONDS)

    def _fire(self, kind: str, driver: subprocess.Popen[str]) -> bool:
        """Brings a fault about, unless there is nothing yet for it to hit."""
        if kind in STORAGE_KINDS:
            return self.store.fail(kind, self.storage_seconds)
        cards = card_processes(self.session)
        manifests = self.store.find("fire/manifest") if kind == "tear manifest" else []
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
                self.store.write(torn, self.store.read(torn)[: self.rng.randrange(200)])
        return True

    def _count_retries(self) -> None:
        with contextlib.suppress(Exception):
            self.retries += json.loads(self.store.read("fire/progress.json"))["retries"]

    def compare(self) -> dict[str, Any]:
        """What the run under fire lost or did twice."""
        calm, fire = (
            pq.read_table(pa.BufferReader(self.store.read(f"{name}/manifest.parquet"))).to_pylist()
            for name in ("calm", "fire")
        )
        expected = {(row["row"], row["image_index"]): (row["status"], row["sha256"]) for row in calm}
        found = Counter((row["row"], row["image_index"]) for row in fire)
        wrong = [
            row for row in fire if expected.get((row["row"], row["image_index"])) != (row["status"], row["sha256"])
        ]
        there = {path.removeprefix("fire/") for path in self.store.find("fire/images")}
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


class Store:
    """Where outputs go: a directory.

    Args:
        home: it.
    """

    flags: tuple[str, ...] = ()

    def __init__(self, home: Path) -> None:
        self.root = str(home)
        self.filesystem: Any = fsspec.filesystem("file")

    def url(self, output: str) -> str:
        """An output as the job names it."""
        return f"{self.root}/{output}"

    def find(self, directory: str) -> list[str]:
        """All that lies in a directory, by paths below the root; nothing while nobody answers."""
        try:
            found = self.filesystem.find(f"{self.root}/{directory}")
        except Exception:  # libraries of stores have errors of their own
            return []
        return [str(path).removeprefix(f"{self.root}/") for path in sorted(found)]

    def read(self, path: str) -> bytes:
        """What an object holds."""
        data: bytes = self.filesystem.cat_file(f"{self.root}/{path}")
        return data

    def write(self, path: str, data: bytes) -> None:
        """Replaces an object."""
        self.filesystem.pipe_file(f"{self.root}/{path}", data)

    def fail(self, kind: str, seconds: float) -> bool:
        """Has storage fail from now on; returns whether it can."""
        raise NotImplementedError(f"a directory does not fail with {kind}")


class S3Store(Store):
    """A bucket of a real server behind a proxy that makes the faults.

    Args:
        server: started.
        proxy: before it.
    """

    def __init__(self, server: S3Server, proxy: FaultProxy) -> None:
        super().__init__(Path("bucket"))
        self.server, self.proxy = server, proxy
        self.down_until = 0.0
        self.filesystem = fsspec.filesystem("s3", use_listings_cache=False, **server.options)
        options = server.options_at(proxy.port) | {"config_kwargs": {"read_timeout": 5}}
        self.flags = ("--storage-options", json.dumps(options), "--storage-patience", "120")

    def url(self, output: str) -> str:
        """An output as the job names it."""
        return f"s3://bucket/{output}"

    def fail(self, kind: str, seconds: float) -> bool:
        """Has storage fail for so long, unless it fails already."""
        if time.monotonic() < self.down_until:
            return False
        self.down_until = time.monotonic() + seconds
        until = self.down_until
        if kind == "kill server":
            self.server.kill()
            back = self.server.start
        else:
            self.proxy.add(Fault(kind, every=2, when=lambda: time.monotonic() < until))
            back = self.proxy.clear
        threading.Timer(seconds, back).start()
        return True


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


@contextlib.contextmanager
def s3_store(home: Path) -> Iterator[S3Store]:
    """A server with an empty bucket, and the proxy before it."""
    server = S3Server(home / "s3", free_port())
    server.home.mkdir()
    server.start()
    try:
        server.make_bucket()
        with fault_proxy(server.port) as proxy:
            yield S3Store(server, proxy)
    finally:
        server.kill()


@contextlib.contextmanager
def ray_session(cards: int) -> Iterator[str]:
    """A cluster on this machine, which RAY_ADDRESS then names; yields its session's directory."""
    import ray  # reads the token when it is imported

    context = ray.init(
        address="local",
        resources={"HPU": cards},
        num_cpus=os.cpu_count(),
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=100 * 1024**2,
    )
    os.environ["RAY_ADDRESS"] = context.address_info["gcs_address"]
    try:
        yield context.address_info["session_dir"]
    finally:
        ray.shutdown()


def main() -> None:
    """Runs the job calm and under fire, and prints what came of it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--cards", type=int, default=8)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--bad-rows", type=int, default=9, help="rows that raise, kill or hang, in both runs")
    parser.add_argument("--s3", action="store_true", help="write to an S3 server, which fails, too")
    parser.add_argument("--storage-seconds", type=float, default=3.0, help="how long it fails each time")
    parser.add_argument("--only", action="append", choices=[*KINDS, *STORAGE_KINDS], help="draw from these alone")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch-seconds", type=float, default=0.2, help="0.885 is that of a Gaudi2")
    parser.add_argument("--limit", type=float, default=5.0, help="seconds after which a card counts as hung")
    parser.add_argument("--home", type=Path, help="where prompts, outputs and the log go (default: a new directory)")
    arguments = parser.parse_args()
    home = arguments.home or Path(tempfile.mkdtemp(prefix="chaos-"))
    home.mkdir(parents=True, exist_ok=True)
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with contextlib.ExitStack() as stack:
        chaos = Chaos(
            home,
            arguments.images,
            arguments.cards,
            arguments.batch_seconds,
            arguments.limit,
            arguments.bad_rows,
            arguments.only or [*KINDS, *(STORAGE_KINDS if arguments.s3 else ())],
            arguments.storage_seconds,
            stack.enter_context(s3_store(home)) if arguments.s3 else Store(home),
            random.Random(arguments.seed),
        )
        chaos.prepare()
        chaos.session = stack.enter_context(ray_session(arguments.cards))
        calm = chaos.undisturbed()
        fire = chaos.under_fire(arguments.faults)
        outcome = chaos.compare()
    fired = sum(count for kind, count in chaos.done.items() if kind in KINDS | STORAGE_KINDS)
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
