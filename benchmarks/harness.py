"""What the benchmarks share: prompts, a Ray of `ray start`, the command as a user types it, and the figures of what it
has stored."""

from __future__ import annotations

import contextlib
import heapq
import json
import math
import os
import random
import re
import secrets
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs
from helpers import S3Server, StoreServer, free_port, serving
from raynodes import RayNode, descendants

BATCH_SIZE = 8
"""The product's default."""
BATCH_S = 0.885
"""As long as a batch of 8 of Stable Diffusion 2 takes a Gaudi 2 (optimum-habana's README)."""
SHAPES = [(64, 64), (128, 64)]
"""Width and height in pixels; the first is what a simulated card paints if nothing is asked for."""
RUN_TIMEOUT_S = 7200.0
"""Seconds after which a command is taken for hung."""
OBJECT_STORE_BYTES = 2 * 1024**3
"""Of a Ray that is started here. The product puts next to nothing there, and Ray Data no image."""
RAYS_OWN = {"REPORTER_UPDATE_INTERVAL_MS": "5000"}
"""What tests have otherwise for their Rays, at Ray's own value."""
_READY = re.compile(r"card (\S+) \(.*\) is ready after")


def write_prompts(path: Path, rows: int, shapes: int = 1) -> Path:
    """Writes one Parquet file of prompts, whose rows ask for so many shapes in random order; returns its path."""
    table: dict[str, list[Any]] = {
        "id": list(range(rows)),
        "prompt": [f"a photograph, number {n}" for n in range(rows)],
    }
    if shapes > 1:
        sizes = random.Random(0).choices(SHAPES[:shapes], k=rows)
        table |= {"width": [width for width, _ in sizes], "height": [height for _, height in sizes]}
    pq.write_table(pa.table(table), path)
    return path


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A directory for prompts, outputs and logs, removed at the end."""
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as directory:
        yield Path(directory)


@dataclass(frozen=True)
class RayStarted:
    """A Ray of one node."""

    address: str
    """Where drivers connect to."""
    node: RayNode
    """Its processes."""

    def cards(self) -> list[int]:
        """Process ids of its cards."""
        return [pid for pid in self.node.processes() if is_card(pid)]


@contextlib.contextmanager
def ray_started(home: Path, cards: int) -> Iterator[RayStarted]:
    """A Ray that `ray start` starts, with Ray's own settings but for the dashboard, which is left out, and with so many
    HPUs, which nobody has."""
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray warns at each start
    port = free_port()
    session = tempfile.mkdtemp(prefix="ray-")  # sockets are in it, whose paths must be short
    ports = ("dashboard", "ray-client-server", "dashboard-agent-listen", "dashboard-agent-grpc")
    options = ["--head", "--port", str(port), *(f"--{name}-port={free_port()}" for name in ports)]
    options += ["--temp-dir", session, "--include-dashboard=false", "--resources", json.dumps({"HPU": cards})]
    options += ["--object-store-memory", str(OBJECT_STORE_BYTES)]
    node = RayNode(home / "ray", options, environment=RAYS_OWN)
    try:
        yield RayStarted(f"127.0.0.1:{port}", node.start())
    finally:
        node.kill()
        shutil.rmtree(session, ignore_errors=True)


@dataclass
class Command:
    """A command that runs, and its log with the time at which each line came.

    Args:
        arguments: the program and its arguments.
        environment: beside this process's.
    """

    arguments: Sequence[str | Path]
    environment: Mapping[str, str] = field(default_factory=dict)
    log: list[tuple[float, str]] = field(default_factory=list)
    """Time in seconds since the epoch, and a line of standard error."""
    started: float = 0.0
    ended: float = 0.0

    def __enter__(self) -> Command:
        self.started = time.time()
        self.process = subprocess.Popen(
            [*map(str, self.arguments)],
            env=os.environ | self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append((time.time(), line.rstrip()))

    def wait(self, *codes: int) -> None:
        """Waits for its end. Raises RuntimeError if it ends with another code than these, by default 0."""
        try:
            code = self.process.wait(RUN_TIMEOUT_S)
        finally:
            self.ended = self.ended or time.time()
        if code not in (codes or (0,)):
            last = "\n".join(line for _, line in self.log[-20:])
            raise RuntimeError(f"{' '.join(map(str, self.arguments))} ended with {code}:\n{last}")

    def mentions(self, text: str) -> int:
        """Lines of the log that have a text."""
        return sum(text in line for _, line in self.log)


def run_command(prompts: Path | str, output: Path | str, address: str, *flags: str) -> Command:
    """`gaudi-batch run` on simulated cards, with nothing but defaults and the flags that are given."""
    where = ("--prompts", str(prompts), "--output", str(output), "--address", address)
    return Command([sys.executable, "-m", "gaudi_batch", "run", *where, "--device", "simulated", *flags])


@dataclass(frozen=True)
class Batch:
    """One batch of a throughput file."""

    card: str
    stored: float
    """When its last image was in storage, in seconds since the epoch."""
    generate_s: float
    wait_s: float
    """Seconds for which the device was idle before it; for a card's first batch since the model was loaded."""
    images: int
    shape: tuple[float, ...]
    upload_s: float = 0.0
    """Seconds that its images took to be stored, summed over them."""

    @property
    def begun(self) -> float:
        """When its generation began, or as much later as storing its images took."""
        return self.stored - self.generate_s


def read_batches(output: Path | str, **storage_options: Any) -> list[Batch]:
    """The batches of all committed shards, in the order in which they were stored."""
    filesystem, path = url_to_fs(str(output), **storage_options)
    filesystem.invalidate_cache()
    files = filesystem.cat([name for name in filesystem.find(f"{path}/throughput") if name.endswith(".jsonl")])
    lines = [json.loads(line) for data in files.values() for line in data.splitlines()]
    return sorted((parse_batch(line) for line in lines), key=lambda batch: batch.stored)


def parse_batch(line: Mapping[str, Any]) -> Batch:
    """The batch of a line of a throughput file."""
    stored = pa.scalar(line["time"].replace("+00:00", "Z"), pa.string()).cast(pa.timestamp("ms", "UTC")).value / 1000
    shape = tuple(line["bucket"].values())
    uploads = line.get("upload_s", 0.0)
    return Batch(line["card"], stored, line["generate_s"], line["wait_s"], line["images"], shape, uploads)


def ready_times(batches: Iterable[Batch], log: Iterable[tuple[float, str]] = ()) -> dict[str, float]:
    """When each card was ready, in seconds since the epoch: before it waited for its first batch, or when the log says
    so, if that is earlier or the card made none."""
    ready = {match[1]: at for at, line in log if (match := _READY.search(line))}
    firsts: dict[str, Batch] = {}
    for batch in batches:
        firsts.setdefault(batch.card, batch)
    own = {card: batch.begun - batch.wait_s for card, batch in firsts.items()}
    return own | {card: min(at, own.get(card, math.inf)) for card, at in ready.items()}


def batches_needed(batches: Iterable[Batch], batch_size: int = BATCH_SIZE) -> int:
    """How many batches these images need at least, each of one shape."""
    images: Counter[tuple[float, ...]] = Counter()
    for batch in batches:
        images[batch.shape] += batch.images
    return sum(math.ceil(count / batch_size) for count in images.values())


def best_end(ready: Iterable[float], batches: int, batch_s: float) -> float:
    """When a run could end at the earliest: each next batch goes to the card that is free first.

    Args:
        ready: when each card is ready, in seconds.
        batches: how many there are, all alike.
        batch_s: seconds that one takes.
    """
    free = list(ready)
    heapq.heapify(free)
    end = -math.inf
    for _ in range(batches):
        end = free[0] + batch_s
        heapq.heapreplace(free, end)
        # Batches are alike, so the last one that is given ends last.
    return end


def figures(batches: Sequence[Batch], ready: Mapping[str, float], cards: int, command: Command) -> dict[str, float]:
    """What a run on so many cards did with their time; see the headings in `FIGURES`.

    Args:
        batches: all that the command made.
        ready: when each card was ready, in seconds since the epoch.
        cards: that it had.
        command: its beginning and end.
    """
    batch_s = statistics.median(batch.generate_s for batch in batches)
    begun, ended = min(batch.begun for batch in batches), max(batch.stored for batch in batches)
    best = best_end(ready.values(), batches_needed(batches), batch_s)
    return {
        "wall_s": command.ended - command.started,
        "first_batch_s": min(batch.stored for batch in batches) - command.started,
        "first_ready_s": min(ready.values()) - command.started,
        "last_ready_s": max(ready.values()) - command.started,
        "device_share": sum(batch.generate_s for batch in batches) / (cards * (ended - begun)),
        "excess_batches": (ended - best) / batch_s,
        "end_s": command.ended - ended,
    }


FIGURES = {
    "wall_s": ("wall, s", ".1f"),
    "first_batch_s": ("first batch, s", ".1f"),
    "first_ready_s": ("first card ready, s", ".1f"),
    "last_ready_s": ("last card ready, s", ".1f"),
    "device_share": ("device time", ".1%"),
    "excess_batches": ("over the best possible, batches a card", ".2f"),
    "end_s": ("after the last batch, s", ".1f"),
}
"""Their headings, and how they are written."""


@dataclass(frozen=True)
class Sample:
    """What processes had used at a moment."""

    at: float
    """Seconds since the epoch."""
    cpu_s: dict[str, float]
    """CPU seconds so far, by kind of process."""
    rss: dict[str, int]
    """Bytes of resident memory, by kind of process; of cards that of the largest one."""


class Sampler:
    """Samples CPU time and memory of processes from /proc in a thread.

    Args:
        kinds: returns the processes to look at, by kind.
        interval: seconds between two samples.
    """

    def __init__(self, kinds: Callable[[], Mapping[str, Iterable[int]]], interval: float = 1.0) -> None:
        self.samples: list[Sample] = []
        self._kinds, self._interval = kinds, interval
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        used: dict[tuple[str, int], float] = {}
        while True:
            rss: dict[str, int] = {}
            for kind, pids in self._kinds().items():
                for pid in pids:
                    with contextlib.suppress(OSError):
                        used[kind, pid] = _cpu_seconds(pid)
                        rss[kind] = max(rss.get(kind, 0), _rss(pid))
            cpu: dict[str, float] = {}
            for (kind, _), seconds in used.items():
                cpu[kind] = cpu.get(kind, 0.0) + seconds  # what has ended keeps what it had used
            self.samples.append(Sample(time.time(), cpu, rss))
            if self._over.wait(self._interval):
                return

    def at(self, moment: float) -> Sample:
        """The sample nearest to a moment, in seconds since the epoch."""
        return min(self.samples, key=lambda sample: abs(sample.at - moment))


def process_kinds(started: RayStarted, command: Command) -> Callable[[], Mapping[str, list[int]]]:
    """The processes of a run: the driver, the cards, and the rest of Ray."""

    def kinds() -> Mapping[str, list[int]]:
        all_of_node = started.node.processes()
        cards = [pid for pid in all_of_node if is_card(pid)]
        others = sorted(set(all_of_node).difference(cards))
        return {"driver": [command.process.pid], "cards": cards, "ray": others}

    return kinds


def processes_below(pid: int) -> list[int]:
    """A process and all that it has started."""
    return descendants(pid)


def is_card(pid: int) -> bool:
    """Whether a process is that of a card."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::Card")
    return False


def _cpu_seconds(pid: int) -> float:
    """User and system time of a process: fields 14 and 15 of proc(5)'s stat."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _rss(pid: int) -> int:
    """Bytes of resident memory: the second field of proc(5)'s statm is in pages."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def s3_server(home: Path) -> Iterator[StoreServer]:
    """MinIO's S3 in JuiceFS's gateway, with an empty bucket, on this machine's disk."""
    (home / "s3").mkdir()
    with serving(S3Server(home / "s3", free_port())) as server:
        yield server


def storage_flags(options: Mapping[str, Any]) -> tuple[str, ...]:
    """The flags of a job whose output is in a store, and its prompts, too, or on a disk."""
    return "--storage-options", json.dumps(options)
