"""A job under fire: faults drawn by seed hit a run, and what it leaves is compared with that of an undisturbed run.

    python benchmarks/chaos.py --images 20000 --cards 8 --faults 100 --seed 1 --s3

Cards are simulated; all else is real: Ray, its nodes, processes, signals, files, and with --s3 an S3 server behind a
proxy that fails as networks do. Each node is a set of processes of its own; one that is lost is replaced some seconds
later, as an autoscaler would do it. The driver is a process of its own, too, started again with the same command
whenever it ended. Rows that raise, kill, hang or take their node down, and with --s3 a row group whose reading kills,
are part of the job in both runs. One card in the run under fire paints wrong now and then. A node becomes read-only by
a mount of its own, which needs root, or with --s3 by the proxy.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import secrets
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from faultproxy import Fault, FaultProxy, card_at, fault_proxy  # the tests' own server, proxy and nodes
from helpers import S3Server, free_port
from raynodes import RayCluster, RayNode, session_of

from gaudi_batch.layout import IMAGES, METADATA

KINDS = {
    "kill card": 6,
    "stop card": 2,
    "kill node": 3,
    "read-only node": 3,
    "kill driver": 3,
    "terminate driver": 1,
    "tear manifest": 1,
}
"""The faults, and how often each is drawn relative to the others."""
STORAGE_KINDS = {
    "500": 1,
    "503": 1,
    "reset": 1,
    "lost answer": 1,
    "cut": 1,
    "stall": 1,
    "kill server": 1,
    "slow reads": 2,
}
"""Those of storage, each of which lasts."""
SHARD_SIZE = 64
ROW_GROUP_SIZE = 256
DEADLY_ROWS = 8
"""Rows of the row group that kills whoever reads it, the first of the file."""
SLOW_READS = 8
"""Reads of the prompts that are slow each time."""
MAX_DELAY_S = 4.0
POLL_INTERVAL_S = 0.1
REJOIN_S = 3.0
"""How long after the loss of a node another is started in its place."""
LOADING_FACTOR = 6
"""How much longer than at a batch a card may be at its start, when Python imports."""
CLUSTER_LIMIT = 120.0
MAX_STARTS_WITHOUT_FAULT = 20
"""Drivers that may end in a row, with no fault fired meanwhile, before the benchmark gives up."""


@dataclass
class Chaos:
    """One run under fire.

    Args:
        home: where prompts and outputs go.
        images: of the whole job.
        nodes: with the cards.
        batch_seconds: what a card takes for 8 images.
        limit: seconds after which a card that does not move is given up.
        bad_rows: how many rows raise, kill their process, or hang.
        node_rows: how many take their node down.
        lying_share: of the images of module 0 that come out wrong under fire.
        kinds: of faults to draw from.
        storage_seconds: how long storage fails each time.
        read_only_seconds: how long a node can't write each time.
        store: where outputs go.
    """

    home: Path
    images: int
    nodes: Nodes
    batch_seconds: float
    limit: float
    bad_rows: int
    node_rows: int
    lying_share: float
    kinds: list[str]
    storage_seconds: float
    read_only_seconds: float
    store: Store
    rng: random.Random
    share: float = 0.0
    done: Counter[str] = field(default_factory=Counter)
    retries: int = 0
    starts: int = 0

    def command(self, output: str, *flags: str) -> list[str]:
        """The job as a user would start it."""
        rows = self.rng_rows()
        down, rows = rows[: self.node_rows], rows[self.node_rows :]
        simulated = {
            "raise-rows": rows[0::3],
            "kill-rows": rows[1::3],
            "hang-rows": rows[2::3],
            "kill-node-rows": down,
        }
        limits = dict.fromkeys(("first-batch", "batch", "answer"), self.limit)
        limits |= {"loading": self.limit * LOADING_FACTOR, "cluster": CLUSTER_LIMIT}
        return [
            *(sys.executable, "-m", "gaudi_batch", "run", "--device", "simulated", "--address", self.nodes.address),
            *("--prompts", self.store.url("prompts.parquet"), "--output", self.store.url(output)),
            *("--shard-size", str(SHARD_SIZE), f"--simulated.batch-seconds={self.batch_seconds}", "--grace", "2"),
            *("--min-cards", "1"),  # there may be no node at the moment
            *self.store.flags,
            *(f"--simulated.{name}={json.dumps(value)}" for name, value in simulated.items()),
            *(f"--limits.{name}={value}" for name, value in limits.items()),
            *flags,
        ]

    def rng_rows(self) -> list[int]:
        """The rows that can't be made, the same in every call and in no order."""
        return random.Random(7).sample(range(DEADLY_ROWS, self.images), self.bad_rows + self.node_rows)

    def prepare(self) -> None:
        """Writes the prompts, the first few in a row group of their own."""
        table = pa.table({"prompt": [f"prompt {row}" for row in range(self.images)]})
        path = self.home / "prompts.parquet"
        with pq.ParquetWriter(path, table.schema) as writer:
            writer.write_table(table[:DEADLY_ROWS])
            writer.write_table(table[DEADLY_ROWS:], row_group_size=ROW_GROUP_SIZE)
        self.store.take_prompts(path)

    def undisturbed(self) -> float:
        """Runs the job without faults; returns its seconds."""
        started = time.monotonic()
        result = subprocess.run(self.command("calm"), capture_output=True, text=True, check=False)
        if result.returncode not in (0, 3):
            raise SystemExit(f"the undisturbed run ended with {result.returncode}: {result.stderr[-2000:]}")
        return time.monotonic() - started

    def under_fire(self, faults: int) -> float:
        """Runs the job with faults all along: each is due at a random share of the work, and up to `MAX_DELAY_S`
        after that, so that it may hit a driver that has just begun. Returns the run's seconds."""
        weights = KINDS | STORAGE_KINDS
        kinds = self.rng.choices(self.kinds, [weights[kind] for kind in self.kinds], k=faults)
        to_come = sorted(((self.rng.random(), kind) for kind in kinds), reverse=True)
        due: list[tuple[float, str]] = []
        lying = ("--simulated.lying-modules=[0]", f"--simulated.lying-share={self.lying_share}")
        self.done["lying card"] += self.lying_share > 0
        idle_starts = 0
        log = (self.home / "fire.log").open("w")
        started = time.monotonic()
        threading.Thread(target=self._watch, daemon=True).start()
        driver: subprocess.Popen[str] | None = None
        while True:
            if driver is None:
                self.starts += 1
                idle_starts += 1
                if idle_starts > MAX_STARTS_WITHOUT_FAULT:
                    raise SystemExit(f"{idle_starts} drivers in a row ended for no fault; see {log.name}")
                driver = subprocess.Popen(self.command("fire", *lying), stderr=log, stdout=log, text=True)
            if driver.poll() is not None:
                self._count_retries()
                if driver.returncode in (0, 3):
                    self.done["not fired, the run was over"] += len(to_come) + len(due)
                    return time.monotonic() - started
                # SIGTERM itself ends a driver that was so young that it had not yet said what SIGTERM means to it.
                if driver.returncode not in (1, 130, -signal.SIGKILL, -signal.SIGTERM):
                    raise SystemExit(f"the driver ended with {driver.returncode}; see {log.name}")
                driver = None
                continue
            self.nodes.require_kept()
            now = time.monotonic()
            while to_come and to_come[-1][0] <= self.share:
                due.append((now + self.rng.uniform(0, MAX_DELAY_S), to_come.pop()[1]))
            for fault in [fault for fault in due if fault[0] <= now]:
                if self._fire(fault[1], driver):
                    print(f"{time.strftime('%H:%M:%S')} fault: {fault[1]}", file=log, flush=True)
                    self.done[fault[1]] += 1
                    due.remove(fault)
                    idle_starts = 0
                if driver.poll() is not None:
                    break
            time.sleep(POLL_INTERVAL_S)

    def _watch(self) -> None:
        """Keeps up how far the run is; a store that is down takes its time to answer."""
        while True:
            self.share = max(self.share, len(self.store.find("fire/manifest")) * SHARD_SIZE / self.images)
            time.sleep(POLL_INTERVAL_S)

    def _fire(self, kind: str, driver: subprocess.Popen[str]) -> bool:
        """Brings a fault about, unless there is nothing yet for it to hit."""
        if kind in STORAGE_KINDS:
            return self.store.fail(kind, self.storage_seconds)
        cards = card_processes(self.nodes.session)
        if kind in ("kill node", "read-only node"):
            at_work = [node for node in self.nodes.alive if not set(cards).isdisjoint(node.processes())]
            if not at_work:
                return False
            node = self.rng.choice(at_work)
            if kind == "read-only node":
                return self.store.make_read_only(node, self.read_only_seconds)
            node.kill()
            return True
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
        made = Counter((row["row"], row["image_index"]) for row in fire)
        wrong = [
            row for row in fire if expected.get((row["row"], row["image_index"])) != (row["status"], row["sha256"])
        ]
        stored = {path.removeprefix("fire/") for path in self.store.find("fire/images")}
        stored.discard(f"{IMAGES}/{METADATA}")  # describes the others
        named = {row["path"] for row in fire if row["path"]}
        return {
            "images": sum(row["status"] == "ok" for row in fire),
            "failed_rows": sum(row["status"] == "failed" for row in fire),
            "images lost": len(expected.keys() - made.keys()),
            "images twice": sum(count - 1 for count in made.values()),
            "rows wrong": len(wrong),
            "files missing": len(named - stored),
            "files that nobody names": len(stored - named),
        }

    def log_summary(self) -> dict[str, Any]:
        """What the log of the run under fire says of cards that were quarantined, nodes, and drivers that gave up."""
        log = (self.home / "fire.log").read_text(errors="replace")
        wrong = re.findall(r"module 0\) made wrong what was right when made again, (\d+) times", log)
        return {
            "images that the lying card made wrong": sum(map(int, wrong)),
            "quarantined": re.findall(r"card (.* is quarantined: .*)", log),
            "drivers stopped": re.findall(r"stopped: .*", log),
        }


class Nodes:
    """Nodes with cards, each of which has modules of its own. One that is lost is replaced by another with the same, as
    an autoscaler would do it.

    Args:
        cluster: started, with a head alone.
        nodes: how many.
        cards: in all.
        wrapper: a command that runs a node.
    """

    def __init__(self, cluster: RayCluster, nodes: int, cards: int, wrapper: tuple[str, ...]) -> None:
        self.address, self.session = cluster.address, cluster.session
        self.lost = 0
        self._cluster = cluster
        self._wrapper = wrapper
        self._modules = [list(range(cards))[place::nodes] for place in range(nodes)]
        self._nodes = [self._add(place) for place in range(nodes)]
        self._over = threading.Event()
        self._pool = ThreadPoolExecutor(1)
        self._keeper: Future[None] = self._pool.submit(self._keep)

    @property
    def alive(self) -> list[RayNode]:
        """Those that have not been lost."""
        return [node for node in self._nodes if not node.killed]

    def require_kept(self) -> None:
        """Raises what keeps lost nodes from being replaced."""
        if self._keeper.done():
            self._keeper.result()

    def close(self) -> None:
        """Replaces no more."""
        self._over.set()
        self._pool.shutdown()

    def _add(self, place: int) -> RayNode:
        modules = self._modules[place]
        return self._cluster.add(
            "--num-cpus=1",
            f'--resources={{"HPU": {len(modules)}}}',
            wrapper=self._wrapper,
            HABANA_VISIBLE_MODULES=",".join(map(str, modules)),
        )

    def _keep(self) -> None:
        while not self._over.wait(POLL_INTERVAL_S):
            for place, node in enumerate(self._nodes):
                assert node.process is not None
                if node.process.poll() is None:
                    continue
                self.lost += 1
                node.kill()  # cards that were stopped have outlived it
                if self._over.wait(REJOIN_S):
                    return
                self._nodes[place] = self._add(place)


class Store:
    """Where prompts and outputs go: a directory.

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
            paths = self.filesystem.find(f"{self.root}/{directory}")
        except Exception:  # libraries of stores have errors of their own
            return []
        return [str(path).removeprefix(f"{self.root}/") for path in sorted(paths)]

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

    def take_prompts(self, path: Path) -> None:
        """Puts the prompts where the job reads them; here they are there already."""

    def info(self) -> dict[str, int]:
        """What it did to its clients, where nothing else tells."""
        return {}

    def make_read_only(self, node: RayNode, seconds: float) -> bool:
        """Has all that a node writes refused for so long; returns whether it can. The node sees the directory through
        a mount of its own, which can't become read-only while a file is being written."""

        def remount(mode: str) -> bool:
            assert node.process is not None
            enter = ("nsenter", "--target", str(node.process.pid), "--mount")
            change = ("mount", "-o", f"remount,{mode},bind", self.root)
            return subprocess.run([*enter, *change], capture_output=True, check=False).returncode == 0

        if not remount("ro"):
            return False
        _later(seconds, lambda: remount("rw"))
        return True


class S3Store(Store):
    """A bucket of a real server behind a proxy that makes the faults.

    Args:
        server: started.
        proxy: before it.
    """

    def __init__(self, server: S3Server, proxy: FaultProxy) -> None:
        super().__init__(Path("bucket"))
        self.server, self.proxy = server, proxy
        self.slow: list[Fault] = []
        self.refused: list[Fault] = []
        self._fails = False
        self.filesystem = fsspec.filesystem("s3", use_listings_cache=False, **server.options)
        options = json.dumps(server.options_at(proxy.port) | {"config_kwargs": {"read_timeout": 5}})
        self.flags = (
            *("--storage-options", options, "--prompts-storage-options", options),
            *("--storage-patience", "120"),
        )

    def url(self, output: str) -> str:
        """An output as the job names it."""
        return f"s3://bucket/{output}"

    def take_prompts(self, path: Path) -> None:
        """Puts the prompts into the bucket. Who reads the first row group of them, is killed."""
        self.write(path.name, path.read_bytes())
        column = pq.ParquetFile(path).metadata.row_group(0).column(0)
        begin = column.dictionary_page_offset or column.data_page_offset
        deadly = range(begin, begin + column.total_compressed_size)
        self.proxy.add(Fault("kill client", "GET", r"prompts\.parquet", first_byte=deadly))

    def fail(self, kind: str, seconds: float) -> bool:
        """Has storage fail for so long, unless it fails already."""
        if self._fails:
            return False
        if kind == "kill server":
            self._fails = True
            self.server.kill()
            _later(seconds, self._restart)
        elif kind == "slow reads":
            # By number: reads are few, and for a few seconds there may be none.
            self.slow.append(self.proxy.add(Fault("delayed", "GET", r"prompts\.parquet", count=SLOW_READS)))
        else:
            self._fails = True
            self._fault(Fault(kind, every=2), seconds, self._recover)
        return True

    def make_read_only(self, node: RayNode, seconds: float) -> bool:
        """Refuses all that a node's cards write for so long."""
        assert node.process is not None
        session = node.process.pid

        def here(port: int) -> bool:
            return session_of(card_at(port) or 0) == session

        self.refused.append(self._fault(Fault("403", "PUT|POST", code="AccessDenied", client=here), seconds))
        return True

    def info(self) -> dict[str, int]:
        """How many requests were slow or refused."""
        slow, refused = (sum(fault.hits for fault in faults) for faults in (self.slow, self.refused))
        return {"reads that were slow": slow, "writes of read-only nodes that were refused": refused}

    def _fault(self, fault: Fault, seconds: float, then: Callable[[], None] = lambda: None) -> Fault:
        def end() -> None:
            self.proxy.remove(fault)
            then()

        self.proxy.add(fault)
        _later(seconds, end)
        return fault

    def _restart(self) -> None:
        self.server.start()
        self._recover()

    def _recover(self) -> None:
        self._fails = False


def _later(seconds: float, action: Callable[[], object]) -> None:
    """Does something after so long, if this process still runs then."""
    timer = threading.Timer(seconds, action)
    timer.daemon = True
    timer.start()


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
def nodes_with_cards(home: Path, nodes: int, cards: int, mounted: bool) -> Iterator[Nodes]:
    """A cluster whose nodes are processes of their own, and see `home` through mounts of their own if so asked."""
    bind = (
        "unshare",
        "--mount",
        "sh",
        "-c",
        f'mount --bind {shlex.quote(str(home))} {shlex.quote(str(home))} && exec "$@"',
        "sh",
    )
    cluster = RayCluster(home / "cluster")
    try:
        kept = Nodes(cluster.start(), nodes, cards, bind if mounted else ())
        try:
            yield kept
        finally:
            kept.close()
    finally:
        cluster.stop()


def main() -> None:
    """Runs the job calm and under fire, and prints what came of it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--cards", type=int, default=8, help="on all nodes together")
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--bad-rows", type=int, default=9, help="rows that raise, kill or hang, in both runs")
    parser.add_argument("--node-rows", type=int, default=1, help="rows that take their node down, in both runs")
    parser.add_argument("--lying-share", type=float, default=0.02, help="of one card's images, under fire")
    parser.add_argument("--s3", action="store_true", help="read from and write to an S3 server, which fails, too")
    parser.add_argument("--storage-seconds", type=float, default=3.0, help="how long it fails each time")
    parser.add_argument("--read-only-seconds", type=float, default=12.0, help="how long a node can't write each time")
    parser.add_argument("--only", action="append", choices=[*KINDS, *STORAGE_KINDS], help="draw from these alone")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch-seconds", type=float, default=0.2, help="0.885 is that of a Gaudi2")
    parser.add_argument("--limit", type=float, default=5.0, help="seconds after which a card counts as hung")
    parser.add_argument("--home", type=Path, help="where prompts, outputs and the log go (default: a new directory)")
    arguments = parser.parse_args()
    home = (arguments.home or Path(tempfile.mkdtemp(prefix="chaos-"))).resolve()
    home.mkdir(parents=True, exist_ok=True)
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    mounted = os.geteuid() == 0 and not arguments.s3
    kinds = {**KINDS, **(STORAGE_KINDS if arguments.s3 else {})}
    if not (mounted or arguments.s3):
        del kinds["read-only node"]
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(s3_store(home)) if arguments.s3 else Store(home)
        chaos = Chaos(
            home=home,
            images=arguments.images,
            nodes=stack.enter_context(nodes_with_cards(home, arguments.nodes, arguments.cards, mounted)),
            batch_seconds=arguments.batch_seconds,
            limit=arguments.limit,
            bad_rows=arguments.bad_rows,
            node_rows=arguments.node_rows,
            lying_share=arguments.lying_share,
            kinds=arguments.only or list(kinds),
            storage_seconds=arguments.storage_seconds,
            read_only_seconds=arguments.read_only_seconds,
            store=store,
            rng=random.Random(arguments.seed),
        )
        chaos.prepare()
        calm = chaos.undisturbed()
        lost_calm = chaos.nodes.lost
        fire = chaos.under_fire(arguments.faults)
        outcome = chaos.compare()
    fired = sum(count for kind, count in chaos.done.items() if kind in KINDS | STORAGE_KINDS)
    info = {
        "seed": arguments.seed,
        "faults": dict(chaos.done),
        "drivers started": chaos.starts,
        "nodes lost undisturbed": lost_calm,
        "nodes lost under fire": chaos.nodes.lost - lost_calm,
        **outcome,
        **chaos.log_summary(),
        **store.info(),
        "shards done again": chaos.retries,
        "shards done again per fault": round(chaos.retries / max(1, fired), 2),
        "seconds undisturbed": round(calm, 1),
        "seconds under fire": round(fire, 1),
    }
    print(json.dumps(info, indent=1))
    harm = ("images lost", "images twice", "rows wrong", "files missing", "files that nobody names")
    sys.exit(any(outcome[name] for name in harm))


if __name__ == "__main__":
    main()
