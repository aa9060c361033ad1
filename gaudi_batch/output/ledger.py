"""What is written down of a run: run.json, the plan, the commits; what is done, and may this job resume it.

The order of writes is what makes a crash harmless. The plan is put before run.json, so a run that has a run.json has
its plan. A shard's images are put before its manifest, so a manifest points at whole files. A manifest that can't be
read whole, or is one of another run, is no commit. Whatever is written or removed, the lease is looked at just before.
"""

from __future__ import annotations

import io
import json
import math
import os
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gaudi_batch.errors import InputError, StorageError
from gaudi_batch.layout import OWN_FILES, manifest_path, parse_attempt, parse_manifest
from gaudi_batch.output import manifest
from gaudi_batch.output.joined import JoinedManifest
from gaudi_batch.output.lease import COMMIT_SECONDS
from gaudi_batch.output.manifest import CommitFacts
from gaudi_batch.output.run_info import RunRecord
from gaudi_batch.plan import Bucket, Shard
from gaudi_batch.storage.scratch import scratch_directory
from gaudi_batch.storage.store import Storage
from gaudi_batch.text import one_line

if TYPE_CHECKING:
    from gaudi_batch.job import Job

READ_THREADS = 16


class Ledger:
    """The records in one output.

    Args:
        storage: the output.
        hold: returns while this driver may write, and raises if it may not.
        holds: whether a write that has begun may go on.
    """

    def __init__(
        self, storage: Storage, hold: Callable[[], None] = lambda: None, holds: Callable[[], bool] = lambda: True
    ) -> None:
        self.storage = storage
        self.hold = hold
        self._holds = holds
        self.unsettled: set[str] = set()
        """Attempts whose manifest may or may not be in place, since its put has not ended. Whoever has another thread
        call `commit` adds the attempt first, so that nobody takes it for left over before that thread begins."""
        self._run_id: str | None = None  # until run.json has been read, manifests of any run count
        self._record: RunRecord
        self._unwritten: RunRecord | None = None  # what run.json is to say before the next manifest is put
        self._writing = threading.Lock()

    def run(self) -> RunRecord | None:
        """The run that this output belongs to, or None.

        Raises:
            InputError: run.json is there and can't be read.
        """
        data = self.storage.get("run.json")
        if data is None:
            return None
        try:
            # Names of files that are not UTF-8 are in it, which pydantic's reader of JSON takes for broken.
            record = RunRecord(**json.loads(data))
            for part in (record.job, record.fingerprint, record.versions):
                if not isinstance(part, dict):
                    raise TypeError("a part of it is not an object")
            if not all(isinstance(count, int) and count >= 0 for count in (record.rows, record.images)):
                raise ValueError("its rows or images are no count")
            if not isinstance(record.job.get("device"), str):
                raise ValueError("its job has no device")
            if record.threads is not None and not (isinstance(record.threads, int) and record.threads > 0):
                raise ValueError("its threads are no count")
            _ = record.bounds
            if not isinstance(record.run_id, str):
                raise TypeError("its run_id is no text")
            if not isinstance(record.grown, list | tuple):
                raise TypeError("what it says of its growth is no list")
            for stack in record.stacks or ():
                if not (isinstance(stack, dict) and all(isinstance(value, str) for value in stack.values())):
                    raise TypeError("a stack of it is no object of texts")
            self._run_id = record.run_id
            self._record = record
            return record
        except (ValueError, TypeError, RecursionError) as error:
            raise InputError(
                f"{self.storage.url}/run.json can't be read ({one_line(error)}); --overwrite starts this output afresh"
            ) from None

    def holds_run(self) -> bool:
        """Whether there is a run here, or what is left of one."""
        return self.storage.get("run.json") is not None or bool(self.committed_shards())

    def create(self, job: Job, *, afresh: bool = False) -> tuple[RunRecord, list[Shard]]:
        """Plans a job and writes down its plan, then its run.json.

        Args:
            job: the job.
            afresh: whether a run that is here is removed, once the job is planned.

        Raises:
            InputError: the job can't be planned, or there are commits of a run whose run.json is not there.
        """
        shards = list(job.plan())
        if afresh:
            self.start_afresh()
        elif self.committed_shards():
            raise InputError(
                f"{self.storage.url} has manifests of a run and no run.json; bring it back, or start this output afresh"
                " with --overwrite"
            )
        record = RunRecord(
            job=job.describe(),
            fingerprint=job.fingerprint(),
            versions=job.versions(),
            created_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            rows=job.total_rows,
            images=sum(shard.images for shard in shards),
            run_id=secrets.token_hex(8),
            stacks=[],
        )
        self._run_id = record.run_id
        self._record = record
        self.put_plan(shards)
        self.put_json("run.json", record.__dict__)
        return record, shards

    def grow(self, record: RunRecord, shards: Sequence[Shard]) -> None:
        """Writes down a plan that holds more rows, then a run.json that says so. What is killed in between leaves
        shards in the plan that `plan` passes over."""
        self.put_plan(shards)
        self.storage.put("run.json", _json(record.__dict__), self.hold, self._holds, COMMIT_SECONDS)
        self._record = record

    def put_plan(self, shards: Sequence[Shard]) -> None:
        """Writes plan.parquet."""
        table = pa.table(
            {
                "shard": [shard.number for shard in shards],
                "file": [shard.file for shard in shards],
                "start": [shard.start for shard in shards],
                "stop": [shard.stop for shard in shards],
                "width": [shard.bucket.width for shard in shards],
                "height": [shard.bucket.height for shard in shards],
                "steps": [shard.bucket.steps for shard in shards],
                "guidance_scale": [shard.bucket.guidance_scale for shard in shards],
                "rows": [shard.rows for shard in shards],
                "images": [shard.images for shard in shards],
                "only": pa.array([shard.only for shard in shards], pa.list_(pa.int64())),
                "failed_before": [shard.failed_before for shard in shards],
                "images_before": [shard.images_before for shard in shards],
            }
        )
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        # Like a manifest, it must not land when another driver has taken over.
        self.storage.put("plan.parquet", buffer.getvalue(), self.hold, self._holds, COMMIT_SECONDS)

    def plan(self, rows: int) -> list[Shard]:
        """The stored plan of a run of so many rows. What is planned beyond them was to be added to the run by a driver
        that ended before it wrote so into run.json, and is passed over.

        Raises:
            InputError: it is missing or can't be read.
        """
        data = self.storage.get("plan.parquet")
        try:
            if data is None:
                raise ValueError("it is not there")
            table = pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)
            shards = [_shard(row) for row in table.to_pylist()]
            return _of_rows(shards, rows)
        except (pa.ArrowException, OSError, KeyError, ValueError, OverflowError) as error:
            raise InputError(
                f"{self.storage.url}/plan.parquet can't be read ({one_line(error)}); --overwrite starts this output"
                " afresh"
            ) from None

    def committed_shards(self) -> list[int]:
        """Numbers of the shards that have a manifest, from their names alone."""
        numbers = (parse_manifest(name) for name in self.storage.names("manifest"))
        return sorted(number for number in numbers if number is not None)

    def commits(self) -> Iterator[tuple[CommitFacts, pa.Table]]:
        """Every whole manifest, in order of its shard. One that was written in part is passed over."""
        pool = ThreadPoolExecutor(READ_THREADS)
        try:
            for found in _ahead(pool, self._read_commit, self.committed_shards()):
                if found is not None:
                    yield found
        finally:
            # Where one could not be read, the others would take as long to fail.
            pool.shutdown(wait=False, cancel_futures=True)

    def _read_commit(self, shard: int) -> tuple[CommitFacts, pa.Table] | None:
        data = self.storage.get(manifest_path(shard))
        if data is None:
            return None
        try:
            table, facts = manifest.read(data)
        except ValueError:
            return None
        ours = facts.shard == shard and self._run_id in (None, facts.run)
        return (facts, table) if ours else None

    @property
    def stack(self) -> Mapping[str, str] | None:
        """The stack that made the run's last images; None where no card has been asked."""
        return self._record.stacks[-1] or None if self._record.stacks else None

    def use_stack(self, stack: Mapping[str, str]) -> Mapping[str, str]:
        """What this driver's cards have is `stack`: run.json says so before the next manifest is put. Another may take
        its place before that.

        Returns:
            The stack that made the images before; `stack` itself if none is known.
        """
        before = [{}] if self._record.stacks is None else self._record.stacks
        known = bool(before) and before[-1] == stack
        self._unwritten = None if known else replace(self._record, stacks=[*before, stack])
        return self.stack or stack

    def _write_stack(self) -> None:
        with self._writing:
            if self._unwritten is not None:
                # Like a manifest, it must not land when another driver has taken over.
                self.storage.put("run.json", _json(self._unwritten.__dict__), self.hold, self._holds, COMMIT_SECONDS)
                self._record, self._unwritten = self._unwritten, None

    def commit(self, facts: CommitFacts, data: bytes) -> bool:
        """Puts a shard's manifest unless another attempt's is there; returns whether it is this one's that is there.

        Before each try it is made sure that the shard is not committed and then, last, that nobody else drives the run.
        Where the store creates conditionally, a put that lands late takes nobody's place. Where it does not, the lease
        alone guards what is there: a put, or the removal of what is no commit, is given up as soon as the lease could
        not be kept up for so long that another driver may soon take over.

        Raises:
            LeaseLost: another driver has taken over.
            StorageError: storage failed, and whether the manifest is there is not known.
        """
        path = manifest_path(facts.shard)
        looks, in_doubt = 0, False
        self.unsettled.add(facts.attempt)

        def look() -> None:
            nonlocal looks, in_doubt
            looks += 1
            found = self._read_commit(facts.shard)
            if found is not None:
                raise _Committed(found[0].attempt)
            self.hold()
            in_doubt = True

        try:
            self._write_stack()
            while True:
                try:
                    self.storage.put(path, data, look, self._holds, COMMIT_SECONDS, create=True)
                    break
                except FileExistsError:
                    # It may have been removed since, and what is not there now is not removed when it is there again.
                    if self.storage.get(path) is not None:
                        self.storage.remove(path, look, self._holds)  # torn, or of another run
            in_doubt = False
            return True
        except _Committed as there:
            in_doubt = False
            return there.attempt == facts.attempt
        except StorageError as error:
            in_doubt = in_doubt and not (error.refused and looks == 1)
            raise
        finally:
            if not in_doubt:
                self.unsettled.discard(facts.attempt)

    def join_manifests(
        self,
        made_again: Mapping[int, int],
        committed: Mapping[int, str],
        seen: Callable[[pa.Table], None] = lambda table: None,
    ) -> tuple[int, int]:
        """Writes manifest.parquet, all manifests as one, and makes sure that it can be read.

        Args:
            made_again: rows of several shards, with the highest of these, which alone counts.
            committed: the attempt of each committed shard.
            seen: called with the rows of each manifest that count.

        Returns:
            Its images and its failed rows.

        Raises:
            StorageError: the manifests that are there now are others, or what was written is not what is there.
        """
        with scratch_directory("join the manifests") as directory:
            path = Path(directory) / "manifest.parquet"
            try:
                rows, failed = self._join_into(path, made_again, committed, seen)
                if not committed:
                    return 0, 0
                manifest.require_readable(path, rows)
            except (pa.ArrowException, OSError, ValueError) as error:
                raise StorageError(
                    f"can't join the manifests in {directory}: {one_line(error)}; those in manifest/ are as they were"
                ) from None
            self.storage.put_file("manifest.parquet", os.fspath(path), self.hold, self._holds)
            written, stored = path.stat().st_size, self.storage.info("manifest.parquet")["size"]
        if stored != written:
            raise StorageError(f"{self.storage.url}: manifest.parquet has {stored} bytes, and {written} were written")
        return rows - failed, failed

    def _join_into(
        self,
        path: Path,
        made_again: Mapping[int, int],
        committed: Mapping[int, str],
        seen: Callable[[pa.Table], None],
    ) -> tuple[int, int]:
        joined: dict[int, str] = {}
        rows = failed = 0
        with JoinedManifest(path) as file:
            for facts, table in self.commits():
                joined[facts.shard] = facts.attempt
                if made_again:
                    counts = [made_again.get(row, 0) <= facts.shard for row in table.column("row").to_pylist()]
                    table = table.filter(pa.array(counts, pa.bool_()))
                seen(table)
                file.add(table)
                rows += len(table)
                failed += pc.sum(pc.equal(table.column("status"), "failed")).as_py() or 0
            if joined != committed:
                changed = min(shard for shard, _ in joined.items() ^ committed.items())
                raise StorageError(f"{self.storage.url}: the manifest of shard {changed} is not what it just was")
        return rows, failed

    def remove_orphans(self, committed: dict[int, str], is_ours: Callable[[str], bool]) -> int:
        """Removes what attempts left behind that did not commit.

        Args:
            committed: the attempt of each committed shard.
            is_ours: tells of an attempt whether it may be removed: our own, or a dead driver's.

        Returns:
            How many objects or directories were removed.
        """
        removed = 0
        for place in self._attempt_places():
            for name in self.storage.names(place):
                found = parse_attempt(name)
                if found and committed.get(found[0]) != found[1] and is_ours(found[1]):
                    self._remove(f"{place}/{name}")
                    removed += 1
        return removed

    def start_afresh(self) -> None:
        """Removes a run from the output, and nothing else that lies there.

        Commits go first and run.json last, so that a crash in between leaves a run that makes its images again.
        """
        if not self.holds_run():
            return
        for shard in self.committed_shards():
            self._remove(manifest_path(shard))
        for place in self._attempt_places():
            for name in self.storage.names(place):
                if parse_attempt(name):
                    self._remove(f"{place}/{name}")
        for name in OWN_FILES:
            self._remove(name)

    def _remove(self, path: str) -> None:
        self.storage.remove(path, self.hold, self._holds)

    def _attempt_places(self) -> list[str]:
        """The directories in which attempts leave something."""
        return ["images", *(f"throughput/{card}" for card in self.storage.names("throughput"))]

    def put_json(self, name: str, value: Any) -> None:
        """Writes a JSON object for people and programs to read."""
        self.put(name, _json(value))

    def put(self, name: str, data: bytes) -> None:
        """Writes an object of the run's own."""
        self.storage.put(name, data, self.hold, self._holds)

    def get_json(self, name: str) -> dict[str, Any] | None:
        """Reads one, None where there is none that is whole."""
        data = self.storage.get(name)
        try:
            loaded = json.loads(data) if data is not None else None
        except (ValueError, RecursionError):
            return None
        return loaded if isinstance(loaded, dict) else None


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


class _Committed(Exception):
    """A shard is committed."""

    def __init__(self, attempt: str) -> None:
        super().__init__(attempt)
        self.attempt = attempt


def _of_rows(shards: Sequence[Shard], rows: int) -> list[Shard]:
    """A plan up to the first shard that holds rows beyond so many; shards that make rows again hold none anew."""
    planned, found = 0, list[Shard]()
    for shard in shards:
        if not shard.again:
            if planned >= rows:
                break
            planned += shard.rows
        found.append(shard)
    return found


def _shard(row: dict[str, Any]) -> Shard:
    """A shard of the stored plan. Raises KeyError or ValueError where there is none."""
    guidance, only = row["guidance_scale"], row["only"]
    names = ("shard", "file", "start", "stop", "width", "height", "steps", "rows", "images")
    numbers = [row[name] for name in (*names, "failed_before", "images_before")]
    if only is not None:
        numbers += only if isinstance(only, list) else [only]
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise ValueError("a number of it can't be")
    if not isinstance(guidance, float) or not math.isfinite(guidance):
        raise ValueError("a guidance scale of it can't be")
    return Shard(
        number=row["shard"],
        file=row["file"],
        start=row["start"],
        stop=row["stop"],
        bucket=Bucket(row["width"], row["height"], row["steps"], guidance),
        rows=row["rows"],
        images=row["images"],
        only=None if only is None else tuple(only),
        failed_before=row["failed_before"],
        images_before=row["images_before"],
    )


def _ahead(pool: ThreadPoolExecutor, function: Callable[[int], Any], items: Iterable[int]) -> Iterator[Any]:
    """Maps in order with a bounded number of results waiting, so that memory does not grow with the run."""
    waiting = []
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) >= 4 * READ_THREADS:
            yield waiting.pop(0).result()
    for future in waiting:
        yield future.result()
