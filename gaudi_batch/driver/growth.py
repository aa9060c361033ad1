"""Whether a job may go on with an existing run, and how a run gets more rows.

A run belongs to a job by its fingerprint. Two things may change: where the prompts and the model lie, as long as they
are the same bytes, and how many rows there are, as long as none of those that the run has moves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from itertools import takewhile
from typing import Any

import pyarrow as pa

from gaudi_batch.dataset.columns import plain
from gaudi_batch.dataset.prompt_file import content
from gaudi_batch.errors import InputError
from gaudi_batch.job import Job
from gaudi_batch.layout import manifest_path
from gaudi_batch.output import manifest
from gaudi_batch.output.ledger import Ledger
from gaudi_batch.output.reader import OutputReader
from gaudi_batch.output.run_info import RunInfo
from gaudi_batch.plan import Shard
from gaudi_batch.text import one_line, short_repr

BY_HAND = ("files", "limit", "model", "model_revision")
"""Fields of a fingerprint that may differ, each for its own reason."""
SHA256_DIGITS = 64


def _with_mode(name: str, fingerprint: Mapping[str, Any]) -> Any:
    """A field of a fingerprint; that of Gaudi cards names no mode where it is lazy."""
    value = fingerprint.get(name)
    return {"mode": "lazy"} | value if name == "gaudi" and isinstance(value, dict) else value


def differences(run: RunInfo, job: Job) -> list[str]:
    """Why a job can't go on with the run in its output, a line for each field; none if it can."""
    before, now = run.fingerprint, job.fingerprint()
    lines = [
        f"{one_line(name)}: was {short_repr(_with_mode(name, before))}, is {short_repr(_with_mode(name, now))}"
        for name in sorted((before.keys() | now.keys()) - set(BY_HAND))
        if before.get(name) != now.get(name)
    ]
    lines += _model_differences(before, now)
    lines += _file_differences(_files(before), _files(now))
    if not lines and job.total_rows < run.rows:
        limit = job.config.limit
        lines.append(
            f"limit: the run has {run.rows} rows and limit {limit} would leave some out; a run takes more rows and not"
            f" fewer, so give it a limit of {run.rows} or more, or none"
        )
    return lines


def why_not_resumed(ledger: OutputReader, run: RunInfo, job: Job) -> str | None:
    """Why a job can't go on with the run in its output, in one sentence with the ways out; None if it can."""
    different = differences(run, job)
    if not different:
        return _other_columns(ledger, job) if _added_files(run, job) else None
    return (
        f"{ledger.storage.url} belongs to another job; what differs: {'; '.join(different)}. Give the job what the run"
        " began with, name another output, or start this one afresh with --overwrite"
    )


def adds_to(run: RunInfo, job: Job) -> bool:
    """Whether the job has rows or files that its run does not have yet."""
    return job.total_rows > run.rows or bool(_added_files(run, job))


def planned_rows(plan: Sequence[Shard]) -> int:
    """Rows of all shards of a plan; rows that are made again count once."""
    return sum(shard.rows for shard in plan if not shard.is_rerun)


def grow(ledger: Ledger, record: RunInfo, job: Job, cards: int) -> tuple[RunInfo, list[Shard]]:
    """Adds the rows that its run does not have yet, as shards at the end of the plan; the job may have `cards`."""
    plan = ledger.plan(record.rows)
    added = plan_rest(plan, record, job, cards)
    refuse_other_rows(ledger, added, job)
    fingerprint, described = job.fingerprint(), job.describe()
    growth = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "rows": record.rows,
        "images": record.images,
        "files": _added_files(record, job),
    }
    grown = replace(
        record,
        job=record.job | {name: described[name] for name in ("prompts", "limit")},
        fingerprint=record.fingerprint | {"limit": fingerprint["limit"], "files": fingerprint["files"]},
        rows=job.total_rows,
        images=sum(shard.images for shard in (*plan, *added) if not shard.is_rerun),
        grown=[*record.grown, growth],
    )
    ledger.grow(grown, [*plan, *added])
    return grown, [*plan, *added]


def plan_rest(plan: Sequence[Shard], record: RunInfo, job: Job, cards: int) -> list[Shard]:
    """Shards for the rows that a plan lacks. They have the size that the run began with, if its job named one; else
    that of the job now, or sizes that follow its cards."""
    size = record.job.get("shard_size")
    if isinstance(size, int) and size > 0:
        job = replace(job, config=job.config.model_copy(update={"shard_size": size}))
    return list(job.plan(cards, planned_rows(plan), max((shard.number for shard in plan), default=-1) + 1))


def refuse_other_rows(ledger: Ledger, added: Sequence[Shard], job: Job) -> None:
    """Refuses shards of which some are committed with other rows: a plan that had more was lost, and what is committed
    of it would be taken for these.

    Raises:
        InputError: there are such shards.
    """
    shards = {shard.number: shard for shard in added}
    first = min(shards, default=math.inf)
    lost = [number for number in ledger.manifests() if number >= first]
    for info, table in ledger.read_commits(lost):
        if info.retired:
            continue
        shard, rows = shards.get(info.shard), sorted(set(table.column("row").to_pylist()))
        start = job.dataset.files[shard.file].first_row if shard else 0
        is_same = shard is not None and len(rows) == shard.rows and start + shard.start <= rows[0]
        if shard is None or not is_same or rows[-1] >= start + shard.stop:
            raise InputError(
                f"{ledger.storage.url}: shard {info.shard} is committed, and the plan that had it is lost; bring"
                f" plan.parquet back, or remove {manifest_path(info.shard)} and those with higher numbers, and the same"
                " command makes their rows again"
            )


def _added_files(run: RunInfo, job: Job) -> list[str]:
    return [name for name, _ in _files(job.fingerprint())[len(_files(run.fingerprint)) :]]


def _files(fingerprint: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names of prompt files with the digests of their contents, in the order of their rows."""
    files = fingerprint.get("files")
    return [(name, content(str(files[name]))) for name in sorted(files)] if isinstance(files, dict) else []


def _file_differences(before: Sequence[tuple[str, str]], now: Sequence[tuple[str, str]]) -> list[str]:
    kept = len(list(takewhile(lambda pair: pair[0][1] == pair[1][1], zip(before, now, strict=False))))
    if kept == len(before):
        return []
    were, are = dict(before), dict(now)
    if all(are.get(name) == content for name, content in before):
        first = sorted(are.keys() - were.keys())[0]
        return [
            f"prompts file {first!r} is new and sorts before {before[-1][0]!r}, so that rows which the run has would"
            f" get other numbers; name it so that it sorts after {before[-1][0]!r}"
        ]
    return [
        f"prompts file {name!r}: was {one_line(were.get(name, 'not there'))}, is {one_line(are.get(name, 'not there'))}"
        for name in sorted(were.keys() | are.keys())
        if were.get(name) != are.get(name) and (name in were or kept < len(before))
    ]


def _model_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    was, now_is = before.get("model_revision"), now.get("model_revision")
    if was == now_is and len(str(was)) == SHA256_DIGITS:
        return []  # the digest of a directory, which may lie elsewhere
    return [
        f"{name}: was {short_repr(before.get(name))}, is {short_repr(now.get(name))}"
        for name in ("model", "model_revision")
        if before.get(name) != now.get(name)
    ]


def _other_columns(ledger: OutputReader, job: Job) -> str | None:
    """What differs if a job's manifests would have other columns than those in the output, so that they could not be
    joined; None if nothing differs, or there are none."""
    commit = next(ledger.commits(), None)
    if commit is None:
        return None
    had = plain(commit[1].schema.remove_metadata())
    have = plain(
        manifest.schema(job.dataset.carried, has_members=job.config.format != manifest.FILES).remove_metadata()
    )
    for name in [*have.names, *had.names]:
        was, is_now = _type(had, name), _type(have, name)
        if was != is_now:
            return (
                f"prompts: with the files that are new, column {name!r} is {is_now}, and in the manifests of this run"
                f" it is {was}; give the new files the columns of the others, or name another output"
            )
    return None


def _type(schema: pa.Schema, name: str) -> str:
    return one_line(schema.field(name).type, 100) if name in schema.names else "not there"
