"""When nothing is pending, a shard that goes on for too long is made on an idle card, too, and committed once."""

from __future__ import annotations

from dataclasses import replace

import pytest
from world import BUCKETS, RULES, World, shards

from gaudi_batch.plan import Bucket, Shard
from gaudi_batch.scheduling.decisions import Drop, ShardTask
from gaudi_batch.scheduling.events import AttemptEnded, CardDied, ShardBegun, ShardMade, ShardOutcome, TimePassed
from gaudi_batch.scheduling.pace import BatchTimes, Pace
from gaudi_batch.scheduling.schedule import Schedule
from gaudi_batch.scheduling.state import RowCounts, Rules

SHARD_S = 10.0
"""Seconds of a shard on a card that is not slow."""


class Cards:
    """Cards that make shards in times that the test chooses."""

    def __init__(
        self, cards: int, count: int, buckets: int = 1, work: list[Shard] | None = None, rules: Rules = RULES
    ) -> None:
        work = work or shards(count, buckets=buckets)
        self.world = World(Schedule(work, "a", RowCounts(4 * count), rules))
        for card in range(cards):
            self.world.join(card)
        for card in range(cards):
            self.world.ready(card)
        self.last = -1  # the last shard, where a test has one

    def begin(self, card: int) -> ShardTask:
        """A card begins to make what it has."""
        task = self.world.in_flight[card][0]
        self.world.do(self.world.handle(ShardBegun(task.attempt, True, self.world.now)))
        return task

    def make(self, card: int, seconds: float = SHARD_S) -> None:
        """A card makes its first shard, and it is committed."""
        task = self.world.in_flight[card].pop(0)
        self.world.held[task.attempt] = task.shard.number
        self.world.do(self.world.handle(ShardMade(task.attempt, ShardOutcome(4, 0, 0, seconds=seconds))))
        while self.world.commits:
            self.world.commit_first()
        while self.world.recalls:
            self.world.answer_recall(True)

    def holder(self, shard: int) -> int:
        """The one card that has a shard."""
        (card,) = (card for card in self.world.in_flight if shard in self.has(card))
        return card

    def has(self, card: int) -> list[int]:
        return [task.shard.number for task in self.world.in_flight[card]]


def sent_the_last() -> Cards:
    """Each of two cards has made a shard. Card 0 has the third and last one, and card 1 idles."""
    cards = Cards(2, 3)
    cards.begin(0)
    cards.begin(1)
    cards.world.now = SHARD_S
    cards.make(0)
    cards.make(1)
    (cards.last,) = cards.has(0)
    assert cards.has(1) == []
    return cards


@pytest.fixture
def cards() -> Cards:
    """As `sent_the_last`; card 0 has begun."""
    cards = sent_the_last()
    cards.begin(0)
    return cards


def test_a_card_that_hangs_in_the_last_shard_costs_little_more_than_a_shard(cards: Cards) -> None:
    cards.world.wait(SHARD_S)
    assert cards.has(1) == [], "it may still be in time"
    cards.world.wait(SHARD_S * 0.35)
    assert cards.has(1) == [cards.last]
    cards.make(1)
    assert cards.world.committed == {0, 1, 2}
    assert cards.world.finished == [None], "nobody waits for the card that hangs"


def test_the_first_attempt_that_is_made_is_committed_and_the_other_is_dropped(cards: Cards) -> None:
    cards.world.wait(2 * SHARD_S)
    (backup,) = cards.world.in_flight[1]
    assert backup.backup_of == cards.world.in_flight[0][0].attempt
    task = cards.world.in_flight[0].pop(0)
    cards.world.held[task.attempt] = cards.last
    decisions = cards.world.handle(ShardMade(task.attempt, ShardOutcome(4, 0, 0, seconds=20.0)))
    assert Drop(1, backup.attempt) in decisions
    cards.world.do(decisions)
    assert not cards.world.handle(ShardMade(backup.attempt, ShardOutcome(4, 0, 0))), "what comes later changes nothing"
    cards.world.commit_first()
    assert cards.world.finished == [None]


def test_a_shard_that_is_begun_while_the_one_before_is_stored_is_watched_too() -> None:
    """As cards do: they generate the next shard while the images of the last are on their way."""
    cards = Cards(2, 5)
    for card in range(2):
        cards.begin(card)
    cards.world.now = SHARD_S
    for card in range(2):
        following = cards.world.in_flight[card][1] if len(cards.has(card)) > 1 else None
        if following is not None:
            cards.world.do(cards.world.handle(ShardBegun(following.attempt, True, cards.world.now)))
        cards.make(card)
        assert following is None or cards.has(card)[0] == following.shard.number
        assert following is not None or card == 1, "card 0 has two"
    while cards.has(1):
        cards.begin(1)
        cards.make(1)
    assert len(cards.has(0)) == 1
    cards.world.wait(50 * SHARD_S)
    assert cards.has(1) == cards.has(0)


def test_what_a_process_that_stands_still_does_not_give_back_is_made_elsewhere() -> None:
    """It answers no recall."""
    cards = Cards(2, 3)
    cards.world.see()
    for card in range(2):
        cards.begin(card)
    stands_still = 0 if len(cards.has(0)) == 2 else 1
    works = 1 - stands_still
    first, queued = cards.has(stands_still)
    cards.world.now += SHARD_S
    task = cards.world.in_flight[works].pop(0)
    cards.world.held[task.attempt] = task.shard.number
    cards.world.do(cards.world.handle(ShardMade(task.attempt, ShardOutcome(4, 0, 0, seconds=SHARD_S))))
    cards.world.commit_first()
    assert [recall.card for recall in cards.world.recalls] == [stands_still]
    cards.world.recalls.clear()
    for shard in (first, queued):
        cards.world.wait(3 * SHARD_S)
        assert cards.has(works) == [shard]
        cards.make(works)
    assert cards.world.finished == [None]


def test_there_is_one_backup_and_no_more() -> None:
    cards = Cards(4, 5)
    for card in range(4):
        cards.begin(card)
    cards.world.now = SHARD_S
    cards.make(0)
    cards.begin(0)
    for card in (1, 2, 3):
        cards.make(card)
    cards.world.wait(3 * SHARD_S)
    cards.world.wait(30 * SHARD_S)
    at_work = [shards for card in range(4) if (shards := cards.has(card))]
    assert len(at_work) == 2
    assert at_work[0] == at_work[1]


def test_a_card_gets_nothing_before_it_is_done_with_what_it_drops(cards: Cards) -> None:
    cards = Cards(3, 5)
    for card in range(3):
        cards.begin(card)
    cards.world.now = SHARD_S
    for card in (0, 1):
        cards.make(card)
        cards.begin(card)
    cards.make(2)
    cards.world.wait(2 * SHARD_S)  # cards 0 and 1 are overdue, and card 2 backs one of them up
    (backed_up,) = cards.has(2)
    first = 0 if cards.has(0) == [backed_up] else 1
    cards.make(2)
    assert [drop.card for drop in cards.world.drops] == [first]
    assert cards.has(first) == []
    other = 1 - first
    assert cards.has(2) == cards.has(other), "the next overdue shard goes to the card that is free"
    cards.make(2)
    assert cards.world.finished == [None]


def test_no_shard_is_made_twice_while_there_is_other_work() -> None:
    cards = Cards(2, 6)
    cards.begin(0), cards.begin(1)
    cards.world.now = SHARD_S
    cards.make(1)
    cards.begin(1)
    cards.world.wait(50 * SHARD_S)
    assert all(task.backup_of is None for tasks in cards.world.in_flight.values() for task in tasks)


def test_a_card_for_which_no_other_work_is_worth_it_makes_backups() -> None:
    work = [replace(shard, bucket=BUCKETS[0 if shard.number < 8 else 2]) for shard in shards(14)]
    cards = Cards(3, 14, work=work)
    for card in range(3):
        cards.begin(card)
    other = next(card for card in range(3) if cards.has(card)[0] >= 8)
    hangs, idles = (card for card in range(3) if card != other)
    cards.world.now = 50 * SHARD_S
    for card in (hangs, idles):  # they capture their graph
        cards.make(card, 50 * SHARD_S)
    while len(cards.has(hangs)) > 1 or len(cards.has(idles)) > 0:
        cards.make(idles)
    assert cards.world.schedule.pending() > 0, "of the other graph"
    cards.begin(hangs)
    cards.world.wait(2 * SHARD_S)
    assert cards.has(idles) == cards.has(hangs)


def test_the_shard_of_a_slow_card_goes_to_a_fast_one_that_is_done_with_its_own_before_it() -> None:
    cards = Cards(3, 9)
    for _ in range(2):
        for card, seconds in ((0, 3 * SHARD_S), (1, SHARD_S), (2, SHARD_S)):
            cards.begin(card)
            cards.make(card, seconds + 40 * SHARD_S * (_ == 0))
    cards.world.now = 1000.0
    for card in range(3):
        cards.begin(card)
    cards.world.die(2)
    cards.world.ready(2)
    assert cards.has(2) == [], "it would have to capture the graph"
    cards.world.wait(1.0)
    while cards.has(1):
        cards.begin(1)
        cards.world.now += 0.45 * SHARD_S
        cards.make(1)
    assert len(cards.has(0)) == 1
    cards.world.wait(1.0)
    assert cards.has(1) == cards.has(0), "long before it is overdue"


def test_the_shard_of_a_slow_card_goes_to_a_fast_one_at_once() -> None:
    cards = Cards(2, 6)
    for _ in range(2):  # the first of a card captures a graph, which says nothing of its speed
        for card, seconds in ((0, 3 * SHARD_S), (1, SHARD_S)):
            cards.begin(card)
            cards.make(card, seconds)
    cards.world.now = 100.0
    cards.begin(0)
    cards.begin(1)
    cards.world.now += SHARD_S
    cards.make(1)
    assert cards.has(1) == cards.has(0) != [], "card 0 needs 20 s more, and card 1 needs 10"
    assert cards.world.in_flight[1][0].backup_of == cards.world.in_flight[0][0].attempt


def test_a_capture_takes_as_long_for_a_small_shard_as_for_a_large_one() -> None:
    def shard(images: int) -> Shard:
        return Shard(0, 0, 0, images, Bucket(64, 64, 20, 7.5), images, images)

    pace = Pace(batch_size=4)
    pace.took(0, shard(32), 68.0, captured=True)
    pace.took(0, shard(32), 8.0, captured=False)
    assert pace.expected_s(1, shard(4), captures=True) == 61.0
    assert pace.expected_s(1, shard(4), captures=False) == 1.0


def test_a_backup_is_not_worth_a_capture_that_takes_longer() -> None:
    cards = Cards(2, 3, buckets=3)
    cards.begin(0), cards.begin(1)
    cards.world.now = 50.0
    cards.make(0, 50.0)
    cards.begin(0)
    cards.make(1, 50.0)
    cards.world.wait(40.0)
    assert cards.has(1) == [], "nothing is known of that size: no card has made one"


@pytest.mark.parametrize("first", [0, 1])
def test_a_shard_of_which_one_attempt_fails_is_left_to_the_other(cards: Cards, first: int) -> None:
    cards.world.wait(2 * SHARD_S)
    assert cards.has(0) == cards.has(1) == [cards.last]
    cards.world.die(first)
    assert cards.world.schedule.pending() == 0
    cards.make(1 - first)
    assert cards.world.committed == {0, 1, 2}


def test_a_shard_of_which_both_attempts_fail_is_tried_again(cards: Cards) -> None:
    cards.world.wait(2 * SHARD_S)
    cards.world.die(0)
    cards.world.die(1)
    assert cards.world.schedule.pending() == 1
    cards.world.ready(0)
    assert cards.has(0) == [cards.last]
    assert cards.world.in_flight[0][0].announce, "it is suspect now"
    assert cards.world.in_flight[0][0].backup_of is None


def test_a_suspect_shard_gets_no_backup(cards: Cards) -> None:
    cards.world.die(0)
    (task,) = cards.world.in_flight[1]
    assert task.announce
    cards.world.ready(0)
    cards.begin(1)
    cards.world.wait(100 * SHARD_S)
    assert cards.has(0) == []


def test_a_drop_that_is_answered_twice_or_late_changes_nothing(cards: Cards) -> None:
    cards.world.wait(2 * SHARD_S)
    backup = cards.world.in_flight[1][0].attempt
    cards.make(1)
    assert cards.world.finished == [None]
    assert cards.world.handle(AttemptEnded(0, backup)) == []


def test_a_suspect_shard_is_not_kept_for_a_card_that_hangs() -> None:
    cards = Cards(3, 5)
    for card in range(3):
        cards.begin(card)
    cards.world.now = SHARD_S
    for card in range(3):
        cards.make(card)
    idle = next(card for card in range(3) if not cards.has(card))
    hung, dies = (card for card in range(3) if card != idle)
    cards.begin(hung)
    cards.begin(dies)
    cards.world.now += 1.5 * SHARD_S
    cards.world.do(cards.world.handle(TimePassed(cards.world.now)))
    assert cards.has(idle) == cards.has(hung), "the second attempt"
    cards.world.do(cards.world.handle(CardDied(dies, "killed")))
    (kept_for,) = cards.world.schedule._work._reserved.values()
    assert kept_for.number == hung, "of the cards that work, as none idles"
    cards.begin(idle)
    cards.make(idle)
    assert cards.world.schedule._work.cards.by_number[hung].dropping
    assert [task.announce for task in cards.world.in_flight[idle]] == [True], "the suspect shard"


def test_a_reservation_moves_from_a_card_that_works_to_one_that_idles() -> None:
    cards = Cards(2, 2)
    for card in range(2):
        cards.begin(card)
    cards.world.join(2)
    cards.world.do(cards.world.handle(CardDied(1, "killed")))
    work = cards.world.schedule._work
    assert [card.number for card in work._reserved.values()] == [0], "no other card is ready"
    cards.world.ready(2)
    assert not work._reserved
    assert [task.announce for task in cards.world.in_flight[2]] == [True], "it is made alone, on the card that idles"


def test_a_card_that_stands_still_before_it_begins_costs_little_more_than_a_shard() -> None:
    """Its process was stopped right after its shard before, and never says that it has begun."""
    cards = sent_the_last()
    cards.world.wait(SHARD_S)
    cards.world.wait(SHARD_S * 0.4)
    assert cards.has(1) == [cards.last]
    cards.make(1)
    assert cards.world.finished == [None]


@pytest.mark.parametrize("known", [True, False])
def test_a_resumed_run_knows_how_long_batches_take(known: bool) -> None:
    """One shard is left, and its card hangs: nothing was made since, but before."""
    work = shards(1)
    times = {work[0].bucket.batch_kind: BatchTimes(steady_s=50.0, steady=5, warmup_s=36.0, warmup=3)}
    rules = replace(RULES, known_times=times if known else {})
    cards = Cards(2, 1, work=work, rules=rules)
    (holder,) = (card for card in (0, 1) if cards.has(card))
    cards.begin(holder)
    batches = -(-work[0].images // RULES.batch_size)
    capture_s = 6.0 + 10.0 * batches
    cards.world.wait(capture_s)
    assert cards.has(1 - holder) == []
    cards.world.wait(capture_s)
    assert cards.has(1 - holder) == ([0] if known else [])
