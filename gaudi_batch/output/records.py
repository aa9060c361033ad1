"""All that an output says of its run, for whoever describes it: read once, from storage or from what its driver
knows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from gaudi_batch.dataset.reasons import FailedRows
from gaudi_batch.errors import InputError
from gaudi_batch.garbage import no_collections
from gaudi_batch.layout import TIMELINE, own_names
from gaudi_batch.output import manifest
from gaudi_batch.output.reader import READ_THREADS, OutputReader
from gaudi_batch.output.rollup import Commit, failed_rows_of, read_indexes
from gaudi_batch.output.run_info import RunInfo
from gaudi_batch.output.spans import Span, read_spans
from gaudi_batch.output.totals import CommitTotals
from gaudi_batch.plan import Shard


@dataclass(frozen=True)
class RunRecords:
    """The records of a run."""

    reader: OutputReader
    info: RunInfo
    plan: Sequence[Shard]
    """All shards, also those that make rows again."""
    commits: Sequence[Commit]
    """What is committed, in order of the shards."""
    latest_shard_of_row: Mapping[int, int]
    """Rows that several shards have made, each with the highest number of these, which alone counts."""
    spans: Sequence[Span]
    """The times of its drivers; none from older versions."""

    def totals(self) -> CommitTotals:
        """The commits, added up."""
        kinds = {shard.number: shard.bucket.batch_kind for shard in self.plan}
        totals = CommitTotals()
        for commit in self.commits:
            totals.add(commit.info, commit.info.finished_at, kinds.get(commit.info.shard))
        return totals

    def failed(self) -> FailedRows:
        """The failed rows by reason."""
        failed = FailedRows(self.latest_shard_of_row)
        for commit in self.commits:
            if commit.failed is not None:
                failed.add(commit.info.shard, commit.failed)
        return failed

    def images_made_again(self) -> tuple[Counter[str], Counter[str]]:
        """By card, the images and the failed rows of manifests that others have taken the place of; counted only where
        rows were made again, since every manifest is read for it. Raises StorageError."""
        images: Counter[str] = Counter()
        failed: Counter[str] = Counter()
        if self.latest_shard_of_row:
            shards = [commit.info.shard for commit in self.commits]
            for info, table in self.reader.read_commits(shards):
                for row, status in zip(*(table.column(name).to_pylist() for name in ("row", "status")), strict=True):
                    if self.latest_shard_of_row.get(row, info.shard) != info.shard:
                        (failed if status == "failed" else images)[info.card] += 1
        return images, failed

    def timelines(self) -> dict[str, list[dict[str, Any]]]:
        """The lines of `timeline.py` by driver, in the order in which they were written; one that can't be read is
        left out. Raises StorageError."""
        names = own_names(TIMELINE, self.reader.storage.names(TIMELINE))
        lines: dict[str, list[dict[str, Any]]] = {}
        with ThreadPoolExecutor(READ_THREADS) as pool:
            texts = pool.map(self.reader.storage.get, [f"{TIMELINE}/{name}" for name in names])
            for name, data in zip(names, texts, strict=True):
                lines.setdefault(name.partition("-")[0], []).extend(json_lines(data))
        return lines


@no_collections()
def read_records(reader: OutputReader) -> RunRecords:
    """Reads the records of a run: roll-ups, and the manifests that no roll-up has.

    Raises:
        InputError: there is no run in the output.
        StorageError: storage failed.
    """
    info = reader.run()
    if info is None:
        raise InputError(f"{reader.storage.url}: there is no run here (no run.json)")
    spans = read_spans(reader)  # first: what is committed after that lies beyond them
    plan = reader.plan(info.rows)
    listed = reader.manifest_entries()
    commits: dict[int, Commit] = {}
    for index in read_indexes(reader.storage, listed, reader.is_of_run):
        commits |= index.commits
    rows_again: dict[int, list[int]] = {}
    unread = [shard for shard in listed if shard not in commits or commits[shard].info.again]
    for commit, table in reader.read_commits(sorted(unread)):
        if commit.retired:
            continue
        if commit.again:
            rows_again[commit.shard] = table.column("row").to_pylist()
        known = replace(commit, finished_at=manifest.finished_at(table, commit))
        failed = failed_rows_of(table) if commit.failed_rows else None
        commits[commit.shard] = Commit(known, listed[commit.shard], failed)
    latest = {row: shard for shard in sorted(rows_again) for row in rows_again[shard]}
    in_order = [commits[shard] for shard in sorted(commits)]
    return RunRecords(reader, info, plan, in_order, latest, spans)


def json_lines(data: bytes | None) -> Iterable[dict[str, Any]]:
    """The JSON objects in the lines of a file; a line that is none is left out."""
    for line in (data or b"").splitlines():
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            yield value
