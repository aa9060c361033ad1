"""When a card has taken too long: a limit for each phase, and for batches by what has been seen of their kind."""

from __future__ import annotations

from typing import Any

import pytest

from gaudi_batch.card.messages import CardStatus
from gaudi_batch.config.schema import JobConfig
from gaudi_batch.config.sections import LimitsConfig
from gaudi_batch.driver.watchdog import BATCH_LIMIT_FACTOR, BatchTimes, PassedLimit, PhaseRules, passed_limit
from gaudi_batch.plan import BatchKind
from gaudi_batch.scheduling.events import SlowBatch, SlowReading, StorageStalled

CONFIG = JobConfig(
    prompts="prompts",
    output="out",
    device="simulated",
    storage_patience=20,
    limits=LimitsConfig(loading=100, first_batch=50, batch=10, answer=30),
)
SMALL, LARGE = BatchKind(64, 64, 20, True), BatchKind(1024, 1024, 20, True)
LONG = LARGE._replace(steps=500)


def status(phase: str, seconds: float = 0.0, kind: BatchKind | None = None, **more: Any) -> CardStatus:
    return CardStatus(phase, seconds, more.pop("storage_s", 0.0), images=0, kind=kind, **more)


def times(*seen: CardStatus) -> BatchTimes:
    learned = BatchTimes()
    for each in seen:
        learned.learn(each)
    return learned


def made(longest: dict[BatchKind, float], warmup: dict[BatchKind, float] | None = None) -> CardStatus:
    return CardStatus("idle", 0.0, 0.0, 0, batch_s=longest, warmup_s=warmup or {})


@pytest.mark.parametrize(
    ("phase", "kind", "seen", "limit", "name"),
    [
        ("loading", None, [], 100, "loading"),
        ("first batch", SMALL, [], 50, "first_batch"),
        ("first batch", SMALL, [made({SMALL: 1.0})], 50, "first_batch"),
        ("batch", SMALL, [], 50, "first_batch"),  # nobody knows yet how long one takes
        ("batch", LARGE, [made({SMALL: 0.1})], 50, "first_batch"),
        ("batch", LONG, [made({LARGE: 7.0})], 50, "first_batch"),
        ("batch", SMALL, [made({SMALL: 0.1})], 10, "batch"),
        ("batch", SMALL, [made({SMALL: 0.1, LARGE: 7.0})], 10, "batch"),
        ("batch", LARGE, [made({LARGE: 3.0}), made({LARGE: 7.0})], BATCH_LIMIT_FACTOR * 7.0, "batch"),
        ("batch", LARGE, [made({}, {LARGE: 40.0}), made({}, {LARGE: 8.0})], BATCH_LIMIT_FACTOR * 8.0, "batch"),
        ("batch", LARGE, [made({}, {LARGE: 40.0}), made({LARGE: 7.0})], BATCH_LIMIT_FACTOR * 7.0, "batch"),
    ],
)
def test_each_phase_and_each_kind_of_batch_has_its_limit(
    phase: str, kind: BatchKind | None, seen: list[CardStatus], limit: float, name: str
) -> None:
    def after(phase_s: float, since_seen: float) -> PassedLimit | None:
        return passed_limit(status(phase, phase_s, kind), since_seen, PhaseRules(CONFIG, "1 HPU", 1.0, times(*seen)))

    assert after(limit - 1, 0.5) is None
    passed = after(limit - 1, 2)
    assert passed is not None
    assert passed.reason == f"its {phase} took longer than {limit:g} s (limits.{name})"
    assert after(limit + 1, 0) is not None


def test_a_batch_of_a_kind_that_nobody_has_made_is_named() -> None:
    def at(kind: BatchKind) -> PassedLimit | None:
        return passed_limit(
            status("batch", 1e6, kind), 0.0, PhaseRules(CONFIG, "1 HPU", 1.0, times(made({SMALL: 1.0}, {LONG: 9.0})))
        )

    limits = {kind: at(kind) for kind in (SMALL, LARGE, LONG)}
    assert {kind: passed and passed.slow for kind, passed in limits.items()} == {
        SMALL: None,
        LARGE: SlowBatch(LARGE, "50 s (limits.first_batch)"),
        LONG: None,
    }


def test_a_card_that_has_never_answered_is_loading() -> None:
    assert passed_limit(None, 99.0, PhaseRules(CONFIG, "1 HPU", 1.0, times())) is None
    limit = PassedLimit("its loading took longer than 100 s (limits.loading)")
    assert passed_limit(None, 101.0, PhaseRules(CONFIG, "1 HPU", 1.0, times())) == limit


def test_a_card_that_has_nothing_to_do_must_only_answer() -> None:
    idle = status("idle", 1e9)
    assert passed_limit(idle, 30.0, PhaseRules(CONFIG, "1 HPU", 1.0, times())) is None
    limit = PassedLimit("it has not answered for 32 s (limits.answer)")
    assert passed_limit(idle, 32.0, PhaseRules(CONFIG, "1 HPU", 1.0, times())) == limit


@pytest.mark.parametrize("phase", ["idle", "batch"])
def test_storage_has_as_long_as_the_job_says_and_a_minute(phase: str) -> None:
    assert passed_limit(status(phase, storage_s=79.0), 0.0, PhaseRules(CONFIG, "1 HPU", 1.0, times())) is None
    limit = passed_limit(status(phase, storage_s=81.0), 0.0, PhaseRules(CONFIG, "1 HPU", 1.0, times()))
    assert limit == PassedLimit("an operation on storage has not ended for 81 s", StorageStalled())


def test_a_card_does_not_read_for_ever() -> None:
    assert passed_limit(status("idle", reading_s=119.0), 0.0, PhaseRules(CONFIG, "1 HPU", 1.0, times())) is None
    limit = passed_limit(status("idle", reading_s=121.0), 0.0, PhaseRules(CONFIG, "1 HPU", 1.0, times()))
    assert limit == PassedLimit("it has been reading the rows of a shard for 121 s (limits.loading)", SlowReading())
