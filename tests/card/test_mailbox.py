"""What a card's threads tell the driver reaches it once and in order, and what waits for an answer gets one."""

from __future__ import annotations

import threading

from gaudi_batch.card.mailbox import Mailbox
from gaudi_batch.card.messages import Dropped
from gaudi_batch.plan import BatchKind
from gaudi_batch.scheduling.events import BatchAnnounced, ShardBegun, ShardFailed, ShardFailure

KIND = BatchKind(64, 64, 20, True)


def numbers(mailbox: Mailbox, acknowledged: int) -> list[int]:
    return [number for number, _ in mailbox.poll(acknowledged, 0.0).events]


def test_an_event_comes_again_until_it_is_acknowledged() -> None:
    mailbox = Mailbox(lambda: 0.0)
    assert [mailbox.emit(ShardBegun(f"a{n}", True)) for n in range(3)] == [1, 2, 3]
    assert numbers(mailbox, 0) == numbers(mailbox, 0) == [1, 2, 3], "an answer may be lost"
    assert numbers(mailbox, 2) == [3]
    assert numbers(mailbox, 3) == []


def test_a_poll_is_answered_as_soon_as_something_happens() -> None:
    mailbox = Mailbox(lambda: 0.0)
    answers: list[int] = []
    polled = threading.Thread(target=lambda: answers.extend(n for n, _ in mailbox.poll(0, 300.0).events))
    polled.start()
    mailbox.emit(ShardBegun("a1", True))
    polled.join(30)
    assert answers == [1]


def test_an_announcement_waits_until_the_driver_has_acknowledged_it() -> None:
    """Or a row that kills the process would kill it before anybody knows of the row."""
    mailbox, goes_on = Mailbox(lambda: 0.0), threading.Event()
    announced = mailbox.emit(BatchAnnounced("a1", (3,)))

    def announce() -> None:
        mailbox.wait_for_acknowledgement(announced)
        goes_on.set()

    threading.Thread(target=announce, daemon=True).start()
    mailbox.poll(announced - 1, 0.0)
    assert not goes_on.wait(0.2)
    mailbox.poll(announced, 0.0)
    assert goes_on.wait(30)


def test_an_attempt_is_either_begun_or_given_back() -> None:
    mailbox = Mailbox(lambda: 0.0)
    assert mailbox.recall("a1")
    assert not mailbox.begin("a1"), "it was given back"
    assert mailbox.begin("a2")
    assert not mailbox.recall("a2"), "it has begun"
    assert mailbox.recall("a1"), "the same answer again, as the first may be lost"


def test_images_count_as_not_done_until_their_shard_is() -> None:
    mailbox = Mailbox(lambda: 0.0)
    mailbox.stored("a1", 8)
    mailbox.stored("a2", 4)
    assert mailbox.poll(0, 0.0).status.images == 12
    mailbox.emit(ShardFailed("a1", ShardFailure("boom")))
    assert mailbox.poll(0, 0.0).status.images == 4


def test_the_status_says_what_the_device_is_at_and_how_long_batches_take() -> None:
    mailbox = Mailbox(lambda: 7.0)
    assert mailbox.poll(0, 0.0).status.phase == "loading"
    mailbox.enter("first batch", KIND, 5, (1, 2))
    for seconds, warmup in ((9.0, True), (8.0, True), (1.0, False), (2.0, False)):
        mailbox.batch_took(KIND, seconds, warmup)
    status = mailbox.poll(0, 0.0).status
    assert (status.phase, status.kind, status.shard, status.rows) == ("first batch", KIND, 5, (1, 2))
    assert (status.warmup_s, status.batch_s, status.storage_s) == ({KIND: 8.0}, {KIND: 2.0}, 7.0)
    with mailbox.reading(6):
        assert mailbox.poll(0, 0.0).status.reading_shard == 6
    assert mailbox.poll(0, 0.0).status.reading_shard is None


def test_an_attempt_that_is_dropped_before_it_begins_never_does() -> None:
    mailbox = Mailbox(lambda: 0.0)
    mailbox.drop("a1")
    assert mailbox.is_dropped("a1")
    assert not mailbox.begin("a1")
    assert mailbox.begin("a2")
    assert not mailbox.is_dropped("a2")


def test_an_attempt_that_was_given_back_is_dropped_at_once() -> None:
    """The card's threads may have passed it by, and would never say that they are done with it."""
    mailbox = Mailbox(lambda: 0.0)
    assert mailbox.recall("a1")
    mailbox.drop("a1")
    assert [event for _, event in mailbox.poll(0, 0.0).events] == [Dropped("a1")]


def test_images_of_an_attempt_that_was_dropped_do_not_count() -> None:
    mailbox = Mailbox(lambda: 0.0)
    mailbox.stored("a1", 8)
    mailbox.drop("a1")
    mailbox.stored("a1", 8)  # what was on its way
    mailbox.stored("a2", 4)
    assert mailbox.poll(0, 0.0).status.images == 4
