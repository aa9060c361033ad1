"""What a driver writes down of its run: run.json, the plan, the commits.

The order of writes is what makes a crash harmless. The plan is put before run.json, so a run that has a run.json has
its plan. A shard's images are put before its manifest, so a manifest points at whole files. A manifest that can't be
read whole, or is one of another run, is no commit. Whatever is written or removed, the lease is looked at just before.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from gaudi_batch.errors import InputError, StorageError
from gaudi_batch.layout import manifest_path
from gaudi_batch.output import manifest
from gaudi_batch.output.lease import MANIFEST_TIMEOUT_S
from gaudi_batch.output.manifest import CommitInfo
from gaudi_batch.output.plan_file import encode_plan
from gaudi_batch.output.reader import READ_THREADS, OutputReader
from gaudi_batch.output.run_info import RunInfo
from gaudi_batch.plan import Shard
from gaudi_batch.storage.store import Storage


class Holder(Protocol):
    """Who may write: the holder of the output's lease."""

    def ensure_held(self) -> None:
        """Returns while this driver may write. Raises LeaseLost or StorageError if it may not."""

    def holds(self) -> bool:
        """Whether a write that has begun may go on."""


class Ledger(OutputReader):
    """The records of a run in its output, written by the driver that holds the lease.

    Args:
        storage: the output.
        lease: the driver's.
    """

    def __init__(self, storage: Storage, lease: Holder) -> None:
        super().__init__(storage)
        self._lease = lease
        self.in_doubt: set[str] = set()
        """Attempts whose manifest may or may not be stored, since its put has not ended. A caller that has `commit` run
        in another thread adds the attempt before, so that nothing counts its files as leftovers in the meantime."""
        self._unwritten: RunInfo | None = None  # what run.json has to say before the next manifest is put
        self._writing = threading.Lock()

    # -- the run ------------------------------------------------------------------------------------------------

    def refuse_leftovers(self) -> None:
        """Raises InputError if there are commits of a run whose run.json is not there."""
        if self.manifests():
            raise InputError(
                f"{self.storage.url} has manifests of a run and no run.json; bring it back, or start this output afresh"
                " with --overwrite"
            )

    def begin(self, info: RunInfo, shards: Sequence[Shard]) -> None:
        """Writes a new run: its plan, then its run.json."""
        self._info = info
        self._retired = []
        self.put_plan(shards)
        self.put("run.json", info.encode())

    def grow(self, info: RunInfo, shards: Sequence[Shard]) -> None:
        """Writes a plan with more rows, then a run.json that counts them. A driver that is killed in between leaves
        shards in the plan that `plan` passes over."""
        self.put_plan(shards)
        self._put_fenced("run.json", info.encode())
        self._info = info

    def put_plan(self, shards: Sequence[Shard]) -> None:
        """Writes plan.parquet, with the shards that are retired."""
        retired = {shard.number for shard in self._retired}
        self._put_fenced("plan.parquet", encode_plan([*self._retired, *shards], retired))

    def put_recut_plan(self, shards: Sequence[Shard], retired: Sequence[Shard]) -> None:
        """The same, where more shards are retired: those that `retire` has."""
        self._retired = [*self._retired, *retired]
        self.put_plan(shards)

    def retire(self, shards: Sequence[Shard]) -> list[Shard]:
        """Makes sure that shards are never committed; returns those of which that is so.

        A manifest without rows takes the place of theirs, put as a commit is: a driver that was cut off and commits the
        shard later finds it there. A shard that is committed already stays.

        Raises:
            LeaseLost: another driver has taken over.
            StorageError: storage failed.
        """
        assert self._info is not None
        run = self._info.run_id

        def put(shard: Shard) -> bool:
            info = CommitInfo.retiring(shard.number, run)
            return self.commit(info, manifest.build([], pa.table({}), {}, {}, 0, info))

        with ThreadPoolExecutor(READ_THREADS) as pool:
            return [shard for shard, is_retired in zip(shards, pool.map(put, shards), strict=True) if is_retired]

    def use_stack(self, stack: Mapping[str, str]) -> Mapping[str, str]:
        """What this driver's cards have is `stack`: run.json says so before the next manifest is put. Another may take
        its place before that.

        Returns:
            The stack that made the images before; `stack` itself if none is known.
        """
        assert self._info is not None
        before = [{}] if self._info.stacks is None else self._info.stacks
        known = bool(before) and before[-1] == stack
        self._unwritten = None if known else replace(self._info, stacks=[*before, stack])
        return self.stack or stack

    def _write_stack(self) -> None:
        with self._writing:
            if self._unwritten is not None:
                self._put_fenced("run.json", self._unwritten.encode())
                self._info, self._unwritten = self._unwritten, None

    # -- commits ------------------------------------------------------------------------------------------------

    def commit(self, info: CommitInfo, data: bytes) -> bool:
        """Puts a shard's manifest unless another attempt's is there; returns whether it is this one's that is there.

        Before each try it is made sure that the shard is not committed and then, last, that nobody else drives the run.
        Where the store creates conditionally, a put that lands late takes nobody's place. Where it does not, the lease
        alone guards what is there: a put, or the removal of what is no commit, is given up as soon as the lease could
        not be kept up for so long that another driver may soon take over.

        Raises:
            LeaseLost: another driver has taken over.
            StorageError: storage failed, and whether the manifest is there is not known.
        """
        path = manifest_path(info.shard)
        checks, in_doubt = 0, False
        self.in_doubt.add(info.attempt)

        def abort_if_committed() -> None:
            nonlocal checks, in_doubt
            checks += 1
            commit = self.read_commit(info.shard)
            if commit is not None:
                raise _Committed(commit[0].attempt)
            self.ensure_held()
            in_doubt = True

        try:
            self._write_stack()
            while True:
                try:
                    self.storage.put(path, data, abort_if_committed, self._lease.holds, MANIFEST_TIMEOUT_S, create=True)
                    break
                except FileExistsError:
                    # It may have been removed since, and must not be removed again if it comes back.
                    if self.storage.get(path) is not None:
                        self.storage.remove(path, abort_if_committed, self._lease.holds)  # torn, or of another run
            in_doubt = False
            return True
        except _Committed as other:
            in_doubt = False
            return other.attempt == info.attempt
        except StorageError as error:
            in_doubt = in_doubt and not (error.refused and checks == 1)
            raise
        finally:
            if not in_doubt:
                self.in_doubt.discard(info.attempt)

    # -- objects ------------------------------------------------------------------------------------------------

    def ensure_held(self) -> None:
        """See `Holder.ensure_held`."""
        self._lease.ensure_held()

    def put_json(self, name: str, value: Any) -> None:
        """Writes a JSON object."""
        self.put(name, (json.dumps(value, indent=1) + "\n").encode())

    def put(self, name: str, data: bytes) -> None:
        """Writes an object of the run."""
        self.storage.put(name, data, self.ensure_held, self._lease.holds)

    def put_file(self, name: str, path: Path) -> None:
        """The same from a file."""
        self.storage.put_file(name, os.fspath(path), self.ensure_held, self._lease.holds)

    def remove(self, path: str) -> None:
        """Removes an object or a directory, if it is there."""
        self.storage.remove(path, self.ensure_held, self._lease.holds)

    def _put_fenced(self, name: str, data: bytes) -> None:
        """Writes an object that, like a manifest, must not land after another driver has taken over."""
        self.storage.put(name, data, self.ensure_held, self._lease.holds, MANIFEST_TIMEOUT_S)


class _Committed(Exception):
    """The shard is committed already."""

    def __init__(self, attempt: str) -> None:
        super().__init__(attempt)
        self.attempt = attempt
