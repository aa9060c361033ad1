"""What the report of a run shows, from its records alone."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from statistics import median_high, median_low
from typing import Any

from gaudi_batch.config.command import run_command
from gaudi_batch.layout import driver_of
from gaudi_batch.output.cost import money
from gaudi_batch.output.holder import read_lease
from gaudi_batch.output.progress import is_sane, sane_progress, sane_text
from gaudi_batch.output.records import RunRecords
from gaudi_batch.output.spans import card_hours, wall_seconds
from gaudi_batch.output.throughput import rounded
from gaudi_batch.reporting.progress_text import share_of_limit
from gaudi_batch.reporting.report.batches import Batch, counters, pace, read_batches
from gaudi_batch.reporting.report.drawing import STRETCHES_DRAWN, drawn
from gaudi_batch.reporting.report.page import render, version
from gaudi_batch.reporting.report.pictures import describe, pictures
from gaudi_batch.reporting.report.rates import rate_of_all, rates_by_card
from gaudi_batch.reporting.report.timelines import AT_WORK, CardTimeline, Mark, RunClock, timelines
from gaudi_batch.reporting.report.work import BACKUP, GENERATING, KINDS, LOADING, LOST, UNCOMMITTED, WARMUP
from gaudi_batch.reporting.view import NEAR_LIMIT
from gaudi_batch.text import counted, one_line, short_hosts

COMMIT = re.compile("[0-9a-f]{40}")
"""The revision of a hub's model; that of a directory has more digits."""
MAX_CARDS = 256
"""Cards that are drawn and listed: those with faults first, then the slowest."""
MAX_STRETCHES = 60_000
"""Stretches of time that are drawn of all cards."""
MAX_MARKS = 2000
MAX_FAILED_ROWS = 1000
MAX_TEXT = 500
SLOW = 0.8
"""A card below this share of the others' pace is called slow; of cards that are all well, one differs by a few
hundredths."""
IDLE = 0.8
"""A card whose device was busy for less than this share of what the others' were is called idle."""
MIN_DIFFERENCE = 0.1
"""And by this share of its time less; a card that lost this share of its time more than the others is named, too."""


def make_report(records: RunRecords, state: str, reason: str | None, base: str | None = "") -> bytes:
    """The report of a run, as a page of HTML.

    Args:
        records: of the run.
        state: as `status` has it.
        reason: why it stopped, if it did.
        base: address of the output, for links to its images; "" if the page lies in it, None if there is no address.

    Raises:
        StorageError: storage failed.
    """
    return render(describe_report(records, state, reason, base))


def describe_report(records: RunRecords, state: str, reason: str | None, base: str | None = "") -> dict[str, Any]:
    """The data of the page; see `make_report`."""
    batches = read_batches(records)
    lines = records.timelines()
    clock = RunClock(records.spans, batches, lines)
    lease = read_lease(records.reader.storage) if state in ("running", "silent") else None
    # The cards are the last driver's; another may have taken over, and has reported nothing yet.
    may_go_on = lease is not None and [lease.driver] == [name for name, _, _ in clock.drivers[-1:]]
    written = sane_progress(raw := records.reader.get_json("progress.json") or {})
    is_open = lease is not None or (state == "stopped" and raw.get("state") == "running")  # it was killed
    progress = written["cards"]
    as_of = sane_text(written["time"]) if may_go_on and state == "silent" else None
    at_work = {} if state.startswith("complete") else _at_work(progress)
    cards = timelines(lines, batches, clock, at_work, UNCOMMITTED if may_go_on else LOST)
    totals = records.totals()
    cards += [CardTimeline(name, was_ready=True) for name in totals.cards.keys() - {card.name for card in cards}]
    # A place that was given back before its card had loaded is no card; its time counts.
    present = [card for card in cards if card.was_ready or any(mark.kind == "fault" for mark in card.marks)]
    for card in present:
        totals.card(card.name, card.node, None)
    faults = Counter({card.name: sum(mark.kind == "fault" for mark in card.marks) for card in present})
    figures = totals.describe(faults, 0)
    paces = pace(batches, {shard.number: shard.bucket.batch_kind for shard in records.plan})
    measured = counters(batches)
    images_again, failed_again = records.images_made_again()
    described = []
    for card in present:
        of_card = figures["cards"][card.name] | measured.get(card.name, {})
        of_card["images"] -= images_again[card.name]
        of_card["failed_rows"] -= failed_again[card.name]
        described.append(_card(card, of_card, paces) | _now(progress.get(card.name, {}) if may_go_on else {}))
    _flag_unlike(described)
    if state == "running":
        _flag_near_limits(described)
    listed = _most_notable(described)
    places = {name: place for place, name in enumerate(card["name"] for card in listed)}
    short = short_hosts(card["node"] for card in listed)
    for card_record in listed:
        node = card_record["node"]
        card_record["label"] = card_record["name"].replace(node, short.get(node, node)) if node else card_record["name"]
    committers = {driver_of(commit.info.attempt) for commit in records.commits}
    wall_s = wall_seconds(records.spans, committers)
    if wall_s is not None and is_open:  # it has committed images since it wrote its time, and they count
        wall_s = round(clock.wall_s, 3)
    images = figures["images"]
    cost, each = _cost(records, None if is_open else images)
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {
        "output": records.reader.storage.url,
        "base": base,
        "state": state,
        "reason": reason,
        "note": _note(state, as_of, int(written["rows_again"] or 0) if may_go_on else 0),
        "as_of": as_of,
        "made_at": now,
        "version": version(),
        "run_id": records.info.run_id,
        "created_at": records.spans[0].started_at if wall_s is not None else records.info.created_at,
        "asked": _asked(records),
        "command": _command(records),
        "rows_planned": records.info.rows,
        "images_planned": records.info.images,
        "shards_planned": len(records.plan),
        "wall_s": wall_s,
        "images_per_s_wall": rounded(images / wall_s) if wall_s else None,
        "card_hours": card_hours(records.spans, committers),
        "cost": cost,
        "cost_per_image": each,
        "cost_words": [None if amount is None else money(amount) for amount in (cost, each)],
        "drivers": [
            {"driver": name, "start": round(start, 3), "stop": round(stop, 3), **_moments(records, name)}
            for name, start, stop in clock.drivers
        ],
        "time_s": round(clock.wall_s, 3),
        **{name: value for name, value in figures.items() if name != "cards"},
        "failures": records.failed().describe(),
        "failed": _failed_rows(records),
        "cards": listed,
        "cards_total": len(described),
        "cards_ready": sum(card.was_ready for card in present),
        "kinds": KINDS,
        "spent": _spent(cards),
        "stretches": _stretches([card for card in cards if card.name in places], places, clock.wall_s),
        "marks": _marks(cards, places),
        "rates": _rates(batches, clock, places),
        "pictures": [describe(picture) for picture in pictures(records)],
    }


def _note(state: str, as_of: str | None, rows_again: int) -> str | None:
    """What a reader must know of a run of which nobody has said that it is over; None for any other."""
    count = "Images count once their shard is committed, and show in the rates then."
    if rows_again:
        count += f" {counted(rows_again, 'row')} to be run again still count as they were."
    if state == "running":
        return f"The run goes on. {count}"
    wrote = f"wrote last at {as_of}, and its cards are shown as they were then" if as_of else "has written nothing yet"
    return f"The run may be over: its driver {wrote}. {count}" if state == "silent" else None


def _card(card: CardTimeline, figures: Mapping[str, Any], paces: Mapping[str, float]) -> dict[str, Any]:
    spent = card.seconds()
    flags = []
    card_pace = paces.get(card.name)
    if card_pace is not None and card_pace < SLOW:
        flags.append(f"slow: {card_pace:.2f} of the others' pace")
    if any(mark.kind == "quarantined" for mark in card.marks):
        flags.append("quarantined")
    if figures.get("throttled"):
        flags.append(f"throttled: {figures['throttled']}")
    if figures["faults"]:
        flags.append(f"{figures['faults']} fault{'s' if figures['faults'] > 1 else ''}")
    return {
        "name": card.name,
        **figures,
        "pace": rounded(card_pace),
        "spent": {kind: round(seconds, 3) for kind, seconds in spent.items() if seconds},
        "flags": flags,
    }


def _cost(records: RunRecords, images: int | None) -> tuple[float | None, float | None]:
    """What the run has cost, as its last driver has counted it, and what an image has; None if that is not known.

    Args:
        records: of the run.
        images: what it has made; None if it goes on, so that those count which it had made when the cost was counted.
    """
    summary, progress = (records.reader.get_json(name) or {} for name in ("summary.json", "progress.json"))
    # A driver that was killed has left no summary, and that of the one before it says less.
    last = (
        summary
        if summary.get("drivers") and len(summary["drivers"]) >= len(progress.get("drivers") or ())
        else progress
    )
    cost, each = last.get("cost"), last.get("cost_per_image")
    if not is_sane(cost):
        return None, None
    made = last.get("images")
    if images is None:
        made = made + again if is_sane(made) and is_sane(again := last.get("images_again")) else made
        each = cost / made if is_sane(made) and made >= 1 else None
    elif not is_sane(each) or made != images:
        each = cost / images if images else None
    return cost, each


def _command(records: RunRecords) -> str:
    """The command that repeats the run beside it, with the revision of the hub's model that it had."""
    job = dict(records.info.job)
    revision = str(records.info.fingerprint.get("model_revision"))
    if COMMIT.fullmatch(revision) and not job.get("revision"):
        job["revision"] = revision
    return run_command(job, f"{str(job.get('output', '')).rstrip('/')}-again")


def _at_work(cards: Mapping[str, Mapping[str, Any]]) -> dict[str, float] | None:
    """What the driver that is over or goes on said last of its cards; see `timelines`."""
    if not cards:
        return None
    return {
        name: card["phase_s"]
        for name, card in cards.items()
        if card["phase"] in AT_WORK and card["phase_s"] is not None
    }


def _now(card: Mapping[str, Any]) -> dict[str, Any]:
    """What a card is at, as its driver wrote last."""
    return {name: card.get(name) for name in ("phase", "phase_s", "limit_s")} | {"now": card.get("doing")}


def _flag_near_limits(cards: Iterable[dict[str, Any]]) -> None:
    """Marks the cards that have used a large part of the time after which they are killed for what they are at."""
    for card in cards:
        if share_of_limit(card) >= NEAR_LIMIT:
            card["flags"].append(f"near its limit: {card['phase']}, {card['phase_s']:.0f} s of {card['limit_s']:.0f} s")


def _flag_unlike(cards: Sequence[dict[str, Any]]) -> None:
    """Marks the cards that stood idle, or worked for nothing, for a larger part of their time than the others."""
    # Loading counts for neither: who was given back early has loaded for as long as the others.
    held = {card["name"]: sum(card["spent"].values()) - card["spent"].get(LOADING, 0.0) for card in cards}
    known = [card for card in cards if held[card["name"]] > 0]

    def shares(*kinds: str) -> dict[str, float]:
        return {
            card["name"]: sum(card["spent"].get(kind, 0.0) for kind in kinds) / held[card["name"]] for card in known
        }

    lost, busy = shares(LOST), shares(WARMUP, GENERATING, UNCOMMITTED, BACKUP, LOST)
    usually_lost = median_low(lost.values()) if known else 0.0  # of two cards one has lost nothing
    usually_busy = median_high(busy.values()) if known else 0.0
    for card in known:
        name = card["name"]
        if lost[name] > usually_lost + MIN_DIFFERENCE:
            card["flags"].append(f"lost: {lost[name]:.0%} of its time, others {usually_lost:.0%}")
        if busy[name] < min(IDLE * usually_busy, usually_busy - MIN_DIFFERENCE):
            card["flags"].append(f"idle: busy for {busy[name]:.0%} of its time, others for {usually_busy:.0%}")


def _most_notable(cards: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cards that are shown, in order of their names."""
    by_need = sorted(cards, key=lambda card: (-len(card["flags"]), card["pace"] if card["pace"] is not None else 0.0))
    return sorted(by_need[:MAX_CARDS], key=lambda card: _natural(card["name"]))


def _natural(name: str) -> list[tuple[int, str]]:
    """A key by which node-2 comes before node-10."""
    parts: list[tuple[int, str]] = []
    number = ""
    for character in f"{name} ":
        if character.isdecimal():
            number += character
            continue
        if number:
            parts.append((int(number), ""))
            number = ""
        parts.append((-1, character))
    return parts


def _asked(records: RunRecords) -> dict[str, Any]:
    """What was asked, for a person."""
    job, same = records.info.job, records.info.fingerprint
    names = ("model", "device", "batch_size", "num_images", "width", "height", "steps", "guidance_scale", "scheduler")
    more = ("dtype", "seed", "negative_prompt", "format", "encoding", "lora", "limit")
    stack = records.reader.stack or records.info.versions
    asked = {"prompts": job.get("prompts"), **{name: same.get(name, job.get(name)) for name in (*names, *more)}}
    asked["model_revision"] = same.get("model_revision")
    given = {name: value for name, value in asked.items() if value not in (None, [], {}, "")}
    return {
        # Seeds have up to 63 bits, and JavaScript's numbers 53.
        "job": {name: value if isinstance(value, str) else json.dumps(value) for name, value in given.items()},
        "stack": dict(stack),
    }


def _moments(records: RunRecords, driver: str) -> dict[str, Any]:
    span = next((span for span in records.spans if span.driver == driver), None)
    return {} if span is None else {"started_at": span.started_at, "ended_at": span.ended_at}


def _failed_rows(records: RunRecords) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for commit in records.commits:
        if commit.failed is None or len(rows) >= MAX_FAILED_ROWS:
            continue
        shard = commit.info.shard
        rows += [
            {name: one_line(row[name] or "", MAX_TEXT) for name in ("id", "error")} | {"row": row["row"]}
            for row in commit.failed.to_pylist()
            if records.latest_shard_of_row.get(row["row"], shard) == shard
        ]
    return rows[:MAX_FAILED_ROWS]


def _spent(cards: Iterable[CardTimeline]) -> dict[str, float]:
    """Seconds of all cards by kind."""
    total = dict.fromkeys(KINDS, 0.0)
    for card in cards:
        for kind, seconds in card.seconds().items():
            total[kind] += seconds
    return {kind: round(seconds, 3) for kind, seconds in total.items()}


def _stretches(cards: Sequence[CardTimeline], places: Mapping[str, int], wall_s: float) -> list[list[Any]]:
    resolution = wall_s / min(STRETCHES_DRAWN, max(100, MAX_STRETCHES // max(1, len(cards))))
    kinds = list(KINDS)
    return [
        [places[card.name], kinds.index(stretch.kind), round(stretch.start, 3), round(stretch.stop, 3)]
        for card in cards
        for stretch in drawn(card.stretches, resolution)
    ]


def _marks(cards: Iterable[CardTimeline], places: Mapping[str, int]) -> list[list[Any]]:
    """The last marks, faults first."""
    marks: list[tuple[str, Mark]] = [(card.name, mark) for card in cards if card.name in places for mark in card.marks]
    marks.sort(key=lambda item: (item[1].kind != "fault", -item[1].time))
    kept = sorted(marks[:MAX_MARKS], key=lambda item: item[1].time)
    return [[places[name], mark.kind, round(mark.time, 3), mark.text[:MAX_TEXT]] for name, mark in kept]


def _rates(batches: Sequence[Batch], clock: RunClock, places: Mapping[str, int]) -> dict[str, Any]:
    of_all, by_card = rate_of_all(batches, clock), rates_by_card(batches, clock)
    return {
        "bin_s": round(of_all.bin_s, 4),
        "all": [round(value, 4) for value in of_all.values[""].tolist()] if of_all.values else [],
        "card_bin_s": round(by_card.bin_s, 4),
        "cards": [
            [places[name], [round(value, 4) for value in values.tolist()]]
            for name, values in by_card.values.items()
            if name in places
        ],
    }
