"""What is left of a run, cut anew for the cards that there are now.

A run that was planned for two cards has shards that are too large for twenty. Shards that are not committed are
retired: a manifest without rows takes the place of theirs, so that a driver which was cut off can't commit them any
more. Then their rows are planned anew, as shards with new numbers. So a number keeps its rows, or is never committed. A
driver that ends between the two leaves retired shards whose rows are in no other; the next one plans these.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import replace

from gaudi_batch.dataset.scan import row_spans
from gaudi_batch.driver.rerun import first_free, has_any
from gaudi_batch.driver.run_context import Committed, Run
from gaudi_batch.errors import StorageError
from gaudi_batch.plan import GroupRows, RowSpan, Shard
from gaudi_batch.planner import ShardSizes, plan_shards
from gaudi_batch.text import counted

log = logging.getLogger(__name__)


def recut(run: Run, committed: Committed) -> None:
    """Cuts what is left of a run anew if its shards are too large for the cards that the job may have, and the run
    chooses their size.

    Raises:
        InputError: there is no cluster.
        LeaseLost: another driver has taken over.
        StorageError: storage failed.
    """
    done = committed.totals.attempts.keys() | committed.retired
    left = [shard for shard in run.plan if shard.number not in done and not shard.is_rerun]
    if not committed.retired and (not left or run.info.job.get("shard_size", left) is not None):
        return
    config = run.job.config
    cards = run.cards
    sizes = ShardSizes(config.batch_size, config.num_images, cards=cards)
    images = sum(shard.images for shard in left)
    rerun_rows = sorted(run.latest_shard_of_row)
    # A row that another shard has made again must not get into one with a higher number, whose manifest would count.
    too_large = [
        shard for shard in left if not sizes.fits(shard, images) and not has_any(shard, rerun_rows, run.job.dataset)
    ]
    retired = [shard for shard in run.plan if shard.number in committed.retired] + run.ledger.retire(too_large)
    if not retired:
        return
    numbers = {shard.number for shard in retired}
    kept = [shard for shard in run.plan if shard.number not in numbers]
    spans = list(_spans_of(retired, row_spans(run.job.dataset, run.job.rules, config.limit)))
    sizes = replace(sizes, groups=_groups_of(spans))
    rows = sum(shard.rows for shard in retired)
    # A plan that an older version has written again may lack shards that are committed.
    first = first_free([shard.number for shard in run.plan], run.ledger.manifests())
    added = list(plan_shards(spans, rows, sizes, first, [shard for shard in kept if not shard.is_rerun]))
    if sum(shard.rows for shard in added) != rows:
        raise StorageError(f"{run.job.dataset.storage.url}: the prompts are not those that were planned")
    log.info("%s are cut anew into %d, for %s", counted(len(retired), "shard"), len(added), counted(cards, "card"))
    run.ledger.put_recut_plan([*kept, *added], retired)
    run.plan = [*kept, *added]


def _spans_of(shards: Iterable[Shard], spans: Iterable[RowSpan]) -> Iterator[RowSpan]:
    """The parts of these spans that are rows of the shards."""
    ranges: dict[tuple[int, object], list[tuple[int, int]]] = {}
    for shard in shards:
        ranges.setdefault((shard.file, shard.bucket), []).append((shard.start, shard.stop))
    for of_bucket in ranges.values():
        of_bucket.sort()
    for span in spans:
        of_bucket = ranges.get((span.file, span.bucket), [])
        stop = span.start + span.rows
        for index in range(max(0, bisect_right(of_bucket, (span.start, stop)) - 1), len(of_bucket)):
            start, end = of_bucket[index]
            if start >= stop:
                break
            begin, last = max(start, span.start), min(end, stop)
            if begin < last:
                yield span._replace(start=begin, rows=last - begin)


def _groups_of(spans: Iterable[RowSpan]) -> list[GroupRows]:
    """The row groups of spans, which are in order."""
    groups: dict[tuple[int, int], GroupRows] = {}
    for span in spans:
        place, stop = (span.file, span.group), span.start + span.rows
        groups[place] = groups.get(place, GroupRows(*place, span.start, stop))._replace(stop=stop)
    return list(groups.values())
