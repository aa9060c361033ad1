"""What an output says of its run: read from storage alone, from anywhere, while the job runs or after.

Whether a driver on another machine lives only its lease can tell, by being renewed: clocks of machines differ. So where
what it wrote last does not look new, the lease is watched for a while; one that does not count is silent.
"""

from __future__ import annotations

import logging
import time
from datetime import datetime, timezone
from typing import Any

from gaudi_batch.dataset.reasons import FIRST_IDS, reason_lines
from gaudi_batch.errors import InputError
from gaudi_batch.output.cost import cost_words
from gaudi_batch.output.holder import Lease, read_lease
from gaudi_batch.output.progress import is_sane, sane_failures, sane_progress, sane_text, without_doings
from gaudi_batch.output.reader import OutputReader
from gaudi_batch.output.records import read_records
from gaudi_batch.output.totals import is_current
from gaudi_batch.reporting.progress_text import time_left
from gaudi_batch.text import duration, one_line, printable

log = logging.getLogger(__name__)

WATCH_TIMEOUT_S = 15.0
"""Seconds for which a driver on another machine, which may be dead, is watched: it renews its lease every 10 s."""
FRESH_PROGRESS_S = 60.0
"""A driver lives if it has written progress within these seconds, by this machine's clock."""
WATCH_INTERVAL_S = 1.0
"""Seconds between two readings of the lease of a driver that is watched."""
MAX_CARDS_SHOWN = 32
"""Cards that are listed for a person."""
REASONS_SHOWN = 10
TIME_LEFT = ("seconds_left", "seconds_left_low", "seconds_left_high")


def read_status(ledger: OutputReader, watch_s: float | None = None) -> dict[str, Any]:
    """The state of the run in an output.

    Args:
        ledger: of the run.
        watch_s: how many seconds to watch the lease of a driver of which it is not known whether it lives; by default
            `WATCH_TIMEOUT_S`; 0 if the caller has watched it, and it was silent.

    Returns:
        `state` (`complete`, `complete with failed rows`, `stopped`, `running` or `silent`), the counts of shards and
        images, and what progress.json, summary.json and verify.json add. `silent` is a run whose driver has
        written nothing for `silent_s` seconds.

    Raises:
        InputError: there is no run in the output.
    """
    record = ledger.run()
    if record is None:
        raise InputError(f"{ledger.storage.url}: there is no run here (no run.json)")
    plan = ledger.plan(record.rows)
    committed = set(ledger.committed_shards())
    summary = ledger.get_json("summary.json")
    written = ledger.get_json("progress.json") or {}
    progress = sane_progress(written)
    planned = sum(shard.images for shard in plan if shard.number in committed and not shard.is_rerun)
    images = planned - (progress["images_missing"] or 0) - (progress["images_again"] or 0)
    reason, silent_s = summary.get("reason") if summary else None, None
    if summary is not None and is_current(summary, record.rows, len(plan), len(committed)):
        state = str(summary.get("state"))
    else:
        lease = read_lease(ledger.storage)
        state = _state_of(lease)
        if lease is not None and state == "in doubt":
            state, silent_s = _watch(ledger, lease, progress["time"], WATCH_TIMEOUT_S if watch_s is None else watch_s)
        if lease is not None and state == "stopped" and not lease.released:
            reason = f"its driver, {lease.holder}, is gone"
        elif lease is not None and silent_s is not None:
            gone = f"its driver, {lease.holder}, may be dead; the same command resumes"
            reason = f"silent for {duration(silent_s)}; {gone}"
    if state in ("stopped", "silent") and (written.get("state") != "over" or progress["rows_again"]):
        # Its driver was killed: what it wrote last is older than its last commits. Or rows are run again no more.
        records = read_records(ledger)
        totals = records.totals()
        images, counts = totals.images, {"failed_rows": totals.failed_rows, "failures": records.failed().describe()}
        progress |= counts
    current = summary if summary is not None and state.startswith("complete") else None
    return {
        "output": ledger.storage.url,
        "state": state,
        "reason": reason if state in ("stopped", "silent") else None,
        "silent_s": None if silent_s is None else round(silent_s),
        "created_at": record.created_at,
        "rows": record.rows,
        "images_planned": record.images,
        "images_committed": images,
        "shards": len(plan),
        "shards_committed": len(committed),
        "failed_rows": progress["failed_rows"],
        "rows_again": progress["rows_again"] if state == "running" else None,
        "failures": progress["failures"] if current is None else sane_failures(current.get("failures")),
        "images_per_s": progress["images_per_s"],
        **{name: progress[name] if state == "running" else None for name in TIME_LEFT},
        "cost": cost if current is not None and is_sane(cost := current.get("cost")) else progress["cost"],
        "cost_expected": progress["cost_expected"] if state == "running" else None,
        "waits_for": progress["waits_for"] if state == "running" else None,
        "progress_time": progress["time"],
        "cards": progress["cards"] if state in ("running", "silent") else without_doings(progress["cards"]),
        "faults": progress["faults"],
        "verify": _sane_verify(ledger.get_json("verify.json")),
        "summary": current,
    }


def _state_of(lease: Lease | None) -> str:
    if lease is None or lease.released:
        return "stopped"
    alive = lease.is_alive()
    return "in doubt" if alive is None else "running" if alive else "stopped"


def _watch(ledger: OutputReader, lease: Lease, written: Any, watch_s: float) -> tuple[str, float | None]:
    """Whether a driver on another machine lives: the state, and the seconds of silence if it does not."""
    age = _age(written)
    if watch_s and age is not None and abs(age) < FRESH_PROGRESS_S:
        return "running", None
    log.info("looking for up to %.0f s whether its driver, %s, lives", watch_s, lease.holder)
    since = time.monotonic()
    while True:
        time.sleep(min(WATCH_INTERVAL_S, watch_s))
        now = read_lease(ledger.storage)
        if now is None or now.released:
            return "stopped", None
        if (now.driver, now.beat) != (lease.driver, lease.beat):
            return "running", None
        watched = time.monotonic() - since
        if watched >= watch_s:
            return "silent", max(watched, age or 0.0)


def _age(written: Any) -> float | None:
    """Seconds since progress was written, by this machine's clock; None if unknown."""
    try:
        moment = datetime.fromisoformat(str(written).replace("Z", "+00:00"))
        return (datetime.now(timezone.utc) - moment).total_seconds()
    except (ValueError, TypeError, OverflowError):
        return None


def _sane_verify(written: dict[str, Any] | None) -> dict[str, Any] | None:
    """The content of verify.json, with the lengths of its lists of paths; None if it is not sensible."""
    if written is None or not isinstance(written.get("images"), int):
        return None
    lists = {name: written.get(name) for name in ("missing", "torn", "foreign")}
    if not all(isinstance(paths, list) for paths in lists.values()):
        return None
    named = [one_line(path) for kind in ("missing", "torn") for path in lists[kind] or ()]
    counts = {name: len(paths or ()) for name, paths in lists.items()}
    shards = written.get("shards")
    return {
        "time": sane_text(written.get("time")),
        "shards": shards if isinstance(shards, int) else None,
        "images": written["images"],
        **counts,
        "first_paths": named[:FIRST_IDS],
    }


def describe_status(status: dict[str, Any]) -> str:
    """The status in lines for a person."""
    reason = status["reason"]
    state = reason if status["state"] == "silent" else f"{status['state']} ({reason})" if reason else status["state"]
    failed = status["failed_rows"] if status["failed_rows"] is not None else "-"
    again = f", {status['rows_again']} run again" if status["rows_again"] else ""
    lines = [
        f"{status['output']}: {state}",
        f"images   {status['images_committed']} of {status['images_planned']} committed",
        f"shards   {status['shards_committed']} of {status['shards']}",
        f"rows     {status['rows']}, failed {failed}{again}",
    ]
    failures = status["failures"] or []
    lines += [f"failed   {line}" for line in reason_lines(failures[:REASONS_SHOWN])]
    if len(failures) > REASONS_SHOWN:
        lines.append(f"failed   and for {len(failures) - REASONS_SHOWN} more reasons")
    if status["verify"]:
        lines.append(f"verified {describe_verify(status['verify'], status['shards_committed'])}")
    if status["state"] == "running":
        lines.append(f"speed    {_rate(status)} images/s, {time_left(status)}, as of {status['progress_time']}")
    elif status["state"] in ("silent", "stopped") and status["cards"]:
        lines.append(f"as of    {status['progress_time']}:")
    if words := cost_words(status["cost"], status["cost_expected"]):
        lines.append(f"cost     {words.removeprefix('cost ')}")
    if status["waits_for"]:
        lines.append(f"waits    for {status['waits_for']}")
    for name, card in list(status["cards"].items())[:MAX_CARDS_SHOWN]:
        done = f"{card['images']} images, {_rate(card)} images/s, {card['faults']} faults"
        doing = f", {card['doing']}" if card["doing"] else ""
        lines.append(f"card     {name}: {card['state']}{doing}; {done}{_counters(card)}")
    if len(status["cards"]) > MAX_CARDS_SHOWN:
        lines.append(f"card     and {len(status['cards']) - MAX_CARDS_SHOWN} more; --json has all")
    lines += [f"fault    {fault['time']} {fault['card']} {fault['what']}" for fault in status["faults"][-10:]]
    return "\n".join(printable(line) for line in lines)


def describe_verify(verified: dict[str, Any], committed: int) -> str:
    """The result of `--verify`, for `status` and `check`.

    Args:
        verified: `verify` of the status.
        committed: shards that are committed now.
    """
    counts = f"{verified['missing']} missing, {verified['torn']} torn, {verified['foreign']} foreign"
    paths = f" ({', '.join(verified['first_paths'])}; run --repair makes them again)" if verified["first_paths"] else ""
    later = committed - verified["shards"] if verified["shards"] is not None else 0
    since = f", before the last {later} shards were committed" if later > 0 else ""
    return f"{verified['images']} images at {verified['time']}{since}: {counts}{paths}"


def _counters(card: dict[str, Any]) -> str:
    texts = [f"{card[name]:.0f} {unit}" for name, unit in (("watts", "W"), ("temperature_c", "°C")) if card[name]]
    texts += [f"throttled: {card['throttled']}"] if card["throttled"] else []
    return "".join(f", {text}" for text in texts)


def _rate(record: dict[str, Any]) -> str:
    rate = record["images_per_s"]
    return "-" if rate is None else f"{rate:.2f}"
