"""Rows made again, since they failed or their images are lost: new shards at the plan's end that hold just these rows.

A row may then be in several manifests. The one of the highest shard counts, so nothing that is committed is touched.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from gaudi_batch.dataset.reader import PromptDataset
from gaudi_batch.output.rollup import Commit
from gaudi_batch.plan import Bucket, Shard


@dataclass(frozen=True)
class RowsToRetry:
    """The rows of a run that have failed, by whether another try may help."""

    worth_a_try: dict[int, int]
    """Those that may be made in another try, each with the shard that counts."""
    hopeless: int
    """How many others there are: what they ask for is against the rules, whoever tries. A shard that an older version
    committed does not say which of its rows these are; they are tried once more."""


def failed_rows(commits: Iterable[Commit], rows_of_shards: Mapping[int, Sequence[int]]) -> RowsToRetry:
    """The rows that have failed.

    Args:
        commits: every commit in order of its shard.
        rows_of_shards: the rows of each shard that makes rows again.
    """
    failed: dict[int, int] = {}
    hopeless: set[int] = set()
    for commit in commits:
        for row in rows_of_shards.get(commit.info.shard, ()):
            failed.pop(row, None)
        if commit.failed is not None:
            failed.update(dict.fromkeys(commit.failed.column("row").to_pylist(), commit.info.shard))
            hopeless.update(commit.info.bad_rows)
    for row in hopeless:
        failed.pop(row, None)
    return RowsToRetry(failed, len(hopeless))


def plan_rerun(
    wanted: Mapping[int, int],
    images: Mapping[int, int],
    plan: Sequence[Shard],
    dataset: PromptDataset,
    shard_size: int,
    committed: Iterable[int] = (),
) -> list[Shard]:
    """Shards that hold the wanted rows and no others, with numbers after all that are planned or committed. The prompts
    are not read: a row whose images no manifest names asks for about as many as the others of its shard.

    Args:
        wanted: rows, each with the shard that counts for it so far.
        images: how many images manifests name of each row; a row that is missing here had failed.
        plan: the plan so far, in order.
        dataset: the prompts.
        shard_size: rows of a shard at most.
        committed: numbers of shards that have a manifest.
    """
    shards = {shard.number: shard for shard in plan}
    groups: dict[tuple[int, Bucket], list[int]] = {}
    for row, number in sorted(wanted.items()):
        shard = shards[number]
        groups.setdefault((shard.file, shard.bucket), []).append(row - dataset.files[shard.file].first_row)
    planned: list[Shard] = []
    number = first_free(shards, committed)
    for (file, bucket), rows in groups.items():
        remaining = iter(rows)
        while part := tuple(itertools.islice(remaining, shard_size)):
            first = dataset.files[file].first_row
            named = [images[first + row] for row in part if first + row in images]
            unnamed = [shards[wanted[first + row]] for row in part if first + row not in images]
            planned.append(
                Shard(
                    number + len(planned),
                    file,
                    part[0],
                    part[-1] + 1,
                    bucket,
                    len(part),
                    images=sum(named) + sum(max(1, round(shard.images / max(1, shard.rows))) for shard in unnamed),
                    only=part,
                    failed_before=len(unnamed),
                    images_before=sum(named),
                    group=dataset.files[file].group_of(part[0]),
                )
            )
    return planned


def first_free(planned: Iterable[int], committed: Iterable[int]) -> int:
    """The first number of a shard that neither a plan nor a manifest has: a plan may have been lost that had more."""
    return max(itertools.chain(planned, committed), default=-1) + 1


def rows_of_shards(plan: Iterable[Shard], dataset: PromptDataset) -> dict[int, list[int]]:
    """The rows of each shard that makes rows again, numbered over all files."""
    return {shard.number: rows_of(shard, dataset) for shard in plan if shard.only is not None}


def shards_with(latest_shard_of_row: Mapping[int, int], plan: Iterable[Shard], dataset: PromptDataset) -> list[Shard]:
    """The shards that may hold rows which later shards make again."""
    rows = sorted(latest_shard_of_row)
    return [
        shard
        for shard in plan
        if has_any(shard, rows, dataset)
        and (shard.only is None or any(latest_shard_of_row[row] > shard.number for row in rows_of(shard, dataset)))
    ]


def has_any(shard: Shard, rows: Sequence[int], dataset: PromptDataset) -> bool:
    """Whether a shard's range has any of these rows, which are sorted."""
    first = dataset.files[shard.file].first_row
    return bisect_left(rows, first + shard.stop) > bisect_left(rows, first + shard.start)


def rows_of(shard: Shard, dataset: PromptDataset) -> list[int]:
    """The rows of a shard that makes rows again, numbered over all files."""
    return [dataset.files[shard.file].first_row + row for row in shard.only or ()]


def latest_shards_of_rows(plan: Iterable[Shard], dataset: PromptDataset) -> dict[int, int]:
    """The rows of shards that were planned again, each with the highest of these shards."""
    return {row: shard for shard, rows in sorted(rows_of_shards(plan, dataset).items()) for row in rows}
