"""What an output says of its run: read from storage alone, from anywhere, while the job runs or after."""

from __future__ import annotations

import math
from typing import Any

from gaudi_batch.errors import InputError
from gaudi_batch.lease import is_alive, read_lease
from gaudi_batch.ledger import Ledger
from gaudi_batch.text import duration, printable


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
    plan = ledger.plan(record.rows)
    committed = set(ledger.committed_shards())
    summary = ledger.get_json("summary.json")
    progress = _sane(ledger.get_json("progress.json") or {})
    planned = sum(shard.images for shard in plan if shard.number in committed and not shard.again)
    images = planned - (progress.get("images_missing") or 0)
    reason = summary.get("reason") if summary else None
    complete = len(committed) == len(plan)
    if complete and summary is not None and summary.get("state") != "stopped":
        state = str(summary.get("state"))
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


_NUMBERS = ("images_missing", "failed_rows", "images_per_s", "seconds_left", "images", "faults")


def _sane(found: dict[str, Any]) -> dict[str, Any]:
    """What a progress.json says, null where it says nothing sensible: it lies where others may write."""
    cards, faults = found.get("cards"), found.get("faults")
    return {
        **_sane_values(found),
        "time": found.get("time"),
        "cards": {
            name: _sane_values(card) | {"state": card.get("state")}
            for name, card in (cards.items() if isinstance(cards, dict) else ())
            if isinstance(card, dict)
        },
        "faults": [
            {name: fault.get(name) for name in ("time", "card", "what")}
            for fault in (faults if isinstance(faults, list) else ())
            if isinstance(fault, dict)
        ],
    }


def _sane_values(found: dict[str, Any]) -> dict[str, Any]:
    values = {name: found.get(name) for name in _NUMBERS}
    return {
        name: value if isinstance(value, (int, float)) and math.isfinite(value) else None
        for name, value in values.items()
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
        left = duration(status["seconds_left"])
        lines.append(f"speed    {_rate(status)} images/s, {left} left, as of {status['progress_time']}")
    for name, card in status["cards"].items():
        done = f"{card['images']} images, {_rate(card)} images/s, {card['faults']} faults"
        lines.append(f"card     {name}: {card['state']}, {done}")
    lines += [f"fault    {fault['time']} {fault['card']} {fault['what']}" for fault in status["faults"][-10:]]
    return "\n".join(printable(line) for line in lines)


def _rate(record: dict[str, Any]) -> str:
    rate = record["images_per_s"]
    return "-" if rate is None else f"{rate:.2f}"
