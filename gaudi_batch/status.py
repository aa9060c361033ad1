"""What an output says of its run: read from storage alone, from anywhere, while the job runs or after."""

from __future__ import annotations

from typing import Any

from gaudi_batch.errors import InputError
from gaudi_batch.lease import is_alive, read_lease
from gaudi_batch.ledger import Ledger
from gaudi_batch.text import duration


def read_status(ledger: Ledger) -> dict[str, Any]:
    """The state of the run in an output.

    Returns:
        `state` (`complete`, `complete with failed rows`, `stopped` or `running`), the counts of shards and images, and
        what progress.json and summary.json add.

    Raises:
        InputError: there is no run in the output.
    """
    record = ledger.run()
    if record is None:
        raise InputError(f"{ledger.storage.url}: there is no run here (no run.json)")
    plan = ledger.plan()
    committed = set(ledger.committed_shards())
    summary = ledger.get_json("summary.json")
    progress = ledger.get_json("progress.json") or {}
    planned = sum(shard.images for shard in plan if shard.number in committed and not shard.again)
    images = planned - progress.get("images_missing", 0)
    reason = summary["reason"] if summary else None
    complete = len(committed) == len(plan)
    if complete and summary is not None and summary["state"] != "stopped":
        state = summary["state"]
    else:
        lease = read_lease(ledger.storage)
        state = "stopped" if lease is None or lease.released or is_alive(lease) is False else "running"
        reason = (
            f"its driver, {lease.holder}, is gone" if lease and state == "stopped" and not lease.released else reason
        )
    return {
        "output": ledger.storage.url,
        "state": state,
        "reason": reason if state == "stopped" else None,
        "created_at": record.created_at,
        "rows": record.rows,
        "images_planned": record.images,
        "images_committed": images,
        "shards": len(plan),
        "shards_committed": len(committed),
        "failed_rows": progress.get("failed_rows"),
        "images_per_s": progress.get("images_per_s"),
        "seconds_left": progress.get("seconds_left"),
        "progress_time": progress.get("time"),
        "cards": progress.get("cards", {}),
        "faults": progress.get("faults", []),
        "summary": summary if state.startswith("complete") else None,
    }


def describe_status(status: dict[str, Any]) -> str:
    """The status for a person, several lines."""
    lines = [
        f"{status['output']}: {status['state']}" + (f" ({status['reason']})" if status["reason"] else ""),
        f"images   {status['images_committed']} of {status['images_planned']} committed",
        f"shards   {status['shards_committed']} of {status['shards']}",
        f"rows     {status['rows']}, failed {status['failed_rows'] if status['failed_rows'] is not None else '-'}",
    ]
    if status["state"] == "running":
        rate = "-" if status["images_per_s"] is None else f"{status['images_per_s']:.2f}"
        lines.append(
            f"speed    {rate} images/s, {duration(status['seconds_left'])} left, as of {status['progress_time']}"
        )
    for name, card in status["cards"].items():
        rate = "-" if card["images_per_s"] is None else f"{card['images_per_s']:.2f}"
        lines.append(
            f"card     {name}: {card['state']}, {card['images']} images, {rate} images/s, {card['faults']} faults"
        )
    lines += [f"fault    {fault['time']} {fault['card']} {fault['what']}" for fault in status["faults"][-10:]]
    return "\n".join(lines)
