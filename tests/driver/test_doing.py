"""What each card is doing can be read in the log, in progress.json and by `status`; what takes long is said unasked."""

from __future__ import annotations

import contextlib
import io
import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers import command_line, wait_until

from gaudi_batch.card.actor import Card
from gaudi_batch.card.mailbox import Mailbox
from gaudi_batch.card.messages import CardStatus
from gaudi_batch.card.shard_result import PipelineCall, StoredBatch
from gaudi_batch.card.shard_runner import MadeImage
from gaudi_batch.card.store_pool import StorePool
from gaudi_batch.cli import main as cli
from gaudi_batch.driver.doing import WAITS_SAID, Doing, Watch, doings, doings_of, waits_for
from gaudi_batch.driver.slot import Slot
from gaudi_batch.driver.watchdog import BatchTimes, PhaseRules
from gaudi_batch.pipelines.base import Generated, Item
from gaudi_batch.pipelines.simulated import SimulatedPipeline
from gaudi_batch.plan import BatchKind, Bucket
from gaudi_batch.scheduling.cards import CardState

LARGE = BatchKind(1024, 1024, 20, True)
LIMITS = SimpleNamespace(loading=1800.0, first_batch=1800.0, batch=60.0, answer=60.0)
CONFIG: Any = SimpleNamespace(limits=LIMITS, storage_patience=600.0)


def at(status: CardStatus, since_seen: float = 0.0, times: BatchTimes | None = None) -> list[str]:
    return [
        str(doing) for doing in doings_of(status, since_seen, PhaseRules(CONFIG, "1 HPU", 1.0, times or BatchTimes()))
    ]


def test_every_phase_is_said_with_its_shard_its_rows_and_its_limit() -> None:
    times = BatchTimes()
    times.learn(CardStatus("idle", 0.0, 0.0, 0, batch_s={LARGE: 20.0}))
    first = CardStatus("first batch", 590.0, 0.0, 0, LARGE, shard=3, rows=(41,))
    assert at(first, since_seen=10.0) == ["first batch of 1024x1024, row 41, 600 s of 1800 s"]
    batch = CardStatus("batch", 5.0, 0.0, 0, LARGE, shard=3, rows=(40, 41, 44))
    assert at(batch, times=times) == ["batch of 1024x1024, rows 40 to 44, 5 s of 200 s"]
    assert at(CardStatus("loading", 7.0, 0.0, 0)) == ["loading, 7 s of 1800 s"]
    assert at(CardStatus("idle", 7.0, 0.0, 0, reading_s=5.0, reading_shard=8)) == ["reading, shard 8, 5 s of 2400 s"]
    assert at(CardStatus("idle", 7.0, 2.0, 0, storing=12)) == ["storing, 12 images, 2 s of 660 s"]
    assert at(CardStatus("idle", 7.0, 0.0, 0, storing=12, storing_s=3.0)) == ["encoding, 12 images, 3 s"]
    assert at(CardStatus("idle", 7.0, 2.0, 0)) == ["asking storage, 2 s of 660 s"], "as for the record of a shard"
    assert at(CardStatus("idle", 7.0, 0.0, 0)) == ["idle, 7 s"]
    assert at(CardStatus("idle", 7.0, 0.0, 0), since_seen=40.0) == ["silent, 40 s of 61 s"]


def test_a_card_that_is_not_up_says_what_it_waits_for() -> None:
    slot = Slot(3, since=100.0, last_seen=100.0)

    def described(state: CardState) -> list[str]:
        return [str(doing) for doing in doings(slot, state, 145.0, PhaseRules(CONFIG, "1 HPU", 1.0))]

    assert described(CardState.WAITING) == ["waiting, no 1 HPU is free, 45 s"]
    assert described(CardState.STARTING) == ["starting, 45 s"]
    slot.actor = object()
    assert described(CardState.STARTING) == ["loading, 45 s of 1800 s"]
    assert described(CardState.QUARANTINED) == []


def test_a_run_without_a_card_says_what_it_waits_for() -> None:
    unplaced, loading = [Doing("waiting", 45.0)], [Doing("loading", 5.0)]
    assert waits_for([unplaced, unplaced, loading], 0, 0.0, "1 HPU") == "a card: 2 waiting, 1 loading, no 1 HPU is free"
    assert waits_for([], 0, 0.0, "1 HPU") == "a card"
    assert waits_for([loading], 1, 0.0, "1 HPU") is None
    waits = waits_for([loading], 1, 45.0, "1 HPU")
    assert waits == "storage, which the driver has asked for 45 s"


def test_what_takes_long_is_said_once_and_again_when_it_has_taken_twice_as_long() -> None:
    watch, lines = Watch(), []
    for seconds in range(0, 7200, 10):
        lines += watch.due({"a": [Doing("first batch", float(seconds), limit=7200.0, shard=1)]})
    assert [re.findall(r"(\d+) s of", line) for line in lines] == [["3600"]]
    lines.clear()
    for seconds in range(0, 600, 10):
        lines += watch.due({"a": [Doing("batch", float(seconds), limit=7200.0, usual=20.0, shard=2)]})
    assert [re.findall(r"(\d+) s of", line) for line in lines] == [["60"], ["120"], ["240"], ["480"]]
    assert watch.due({"a": [Doing("batch", 40.0, limit=7200.0, usual=20.0, shard=3)]}) == [], "another shard"


def test_a_thousand_cards_are_few_lines() -> None:
    cards = {str(number): [Doing("first batch", 1000.0 + number, limit=1800.0, shard=1)] for number in range(1000)}
    lines = Watch().due(cards)
    assert len(lines) == WAITS_SAID + 1
    assert lines[0].startswith("card 999: first batch, shard 1, 1999 s of 1800 s")
    assert lines[-1] == f"{1000 - WAITS_SAID} more cards take longer than is usual"


def test_a_card_tells_what_it_reads_and_what_waits_to_be_stored() -> None:
    mailbox = Mailbox(lambda: 0.0)
    mailbox.store(3)
    mailbox.store(-1)
    with mailbox.reading(8):
        status = mailbox.poll(0, 0.0).status
        assert (status.storing, status.reading_shard) == (2, 8)
    mailbox.store(-2)
    status = mailbox.poll(0, 0.0).status
    assert (status.storing, status.storing_s, status.reading_shard) == (0, 0.0, None)


def test_a_card_counts_images_until_they_are_stored() -> None:
    card, stored, goes_on = Card.__new__(Card), threading.Semaphore(0), threading.Semaphore(0)
    card._mailbox, card._store, card._store_slots = Mailbox(lambda: 0.0), StorePool(1), threading.Semaphore(1)

    class Output:
        def add(self, *_: Any) -> None:
            goes_on.acquire()

    def storing() -> int:
        return card._mailbox.poll(0, 0.0).status.storing

    output: Any = Output()
    made = [MadeImage(Item(0, image, "p", "", 1), np.zeros((8, 8, 3), np.uint8), None, False) for image in range(2)]
    batch = card._store_batch(
        output, StoredBatch("aaaaa0", PipelineCall("steady", 1.0, 0.0), 0), made, threading.Event()
    )
    assert storing() == 2
    batch.futures[0].add_done_callback(lambda _: stored.release())
    batch.futures[1].add_done_callback(lambda _: stored.release())
    for left in (1, 0):
        goes_on.release()
        stored.acquire()
        assert storing() == left


@pytest.mark.usefixtures("thread_cards")
def test_log_and_status_say_what_a_card_does_that_takes_long(
    write_prompts: Callable[..., Path], tmp_path: Path, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of two batches takes until all has been said of it."""
    output = tmp_path / "out"
    prompts = write_prompts({"prompt": ["small", "large"], "width": [64, 128], "height": [64, 128]})
    line = r"card \S+: first batch of 128x128, row 1, \d+ s of 400 s"
    log, told = io.StringIO(), {}
    generate = SimulatedPipeline.generate

    def generate_until_all_is_said(pipeline: SimulatedPipeline, bucket: Bucket, items: list[Item]) -> Generated:
        if bucket.width == 128:
            wait_until(lambda: "128x128" in (output / "progress.json").read_text())
            told["text"] = command_line("status", output).stdout
            told["json"] = command_line("status", output, "--json").stdout
            wait_until(lambda: re.search(rf"{line}; that is longer than is usual\n", log.getvalue()))
            wait_until(lambda: re.search(rf"{line}\n", log.getvalue()))
        return generate(pipeline, bucket, items)

    for name in ("loop.UNUSUAL_INTERVAL_S", "loop.PROGRESS_INTERVAL_S", "fleet.CARD_POLL_INTERVAL_S"):
        monkeypatch.setattr(f"gaudi_batch.driver.{name}", 0.2)
    monkeypatch.setattr("gaudi_batch.reporting.terminal.CARDS_INTERVAL_S", 0.2)
    monkeypatch.setattr("gaudi_batch.driver.doing.LIMIT_SHARE", 0.005)
    monkeypatch.setattr(SimulatedPipeline, "generate", generate_until_all_is_said)
    job = ("run", "--prompts", str(prompts), "--output", str(output), "--address", cluster, "--device", "simulated")
    slow = ("--simulated.batch-seconds", "0.1", "--limits.first-batch", "400", "--cards", "1", "--batch-size", "1")
    with contextlib.redirect_stderr(log):
        assert cli.main([*job, *slow]) == 0
    text = log.getvalue()
    assert re.search(r"0/2 images, .*; waits for a card", text), text
    assert re.search(rf"card     \S+: ready, {line.partition(': ')[2]}; \d images", told["text"]), told["text"]
    (card,) = json.loads(told["json"])["cards"].values()
    assert (card["phase"], card["bucket"], card["rows"], card["limit_s"]) == ("first batch", "128x128", "1", 400.0)
    assert 0 <= card["phase_s"] <= 400
