"""When a card has taken too long: each phase has its limit, and that of batches follows what has been seen."""

from __future__ import annotations

import pytest

from gaudi_batch.config import JobConfig, LimitsConfig
from gaudi_batch.limits import BATCH_LIMIT_FACTOR, passed_limit
from gaudi_batch.messages import Status
from gaudi_batch.plan import GraphKey

CONFIG = JobConfig(
    prompts="prompts",
    output="out",
    device="simulated",
    storage_patience=20,
    limits=LimitsConfig(loading=100, first_batch=50, batch=10, answer=30),
)
SMALL, LARGE = GraphKey(64, 64, True), GraphKey(1024, 1024, True)


@pytest.mark.parametrize(
    ("phase", "seen", "limit", "name"),
    [
        ("loading", {}, 100, "loading"),
        ("first batch", {}, 50, "first_batch"),
        ("first batch", {SMALL: 1.0}, 50, "first_batch"),
        ("batch", {}, 50, "first_batch"),  # nobody knows yet how long one takes
        ("batch", {SMALL: 0.1}, 10, "batch"),
        ("batch", {SMALL: 0.1, LARGE: 7.0}, BATCH_LIMIT_FACTOR * 7.0, "batch"),
    ],
)
def test_each_phase_has_its_limit(phase: str, seen: dict[GraphKey, float], limit: float, name: str) -> None:
    def after(phase_s: float, since_heard: float) -> str | None:
        status = Status(phase, phase_s, storage_s=0.0, images=0, batch_s={})
        return passed_limit(status, since_heard, 1.0, CONFIG, seen)

    assert after(limit - 1, 0.5) is None
    assert after(limit - 1, 2) == f"its {phase} took longer than {limit:g} s (limits.{name})"
    assert after(limit + 1, 0) is not None


def test_a_card_that_has_never_answered_is_loading() -> None:
    assert passed_limit(None, 99.0, 1.0, CONFIG, {}) is None
    assert passed_limit(None, 101.0, 1.0, CONFIG, {}) == "its loading took longer than 100 s (limits.loading)"


def test_a_card_that_has_nothing_to_do_must_only_answer() -> None:
    idle = Status("idle", 1e9, 0.0, 0, {})
    assert passed_limit(idle, 30.0, 1.0, CONFIG, {}) is None
    assert passed_limit(idle, 32.0, 1.0, CONFIG, {}) == "it has not answered for 32 s (limits.answer)"


@pytest.mark.parametrize("phase", ["idle", "batch"])
def test_storage_has_the_job_s_patience_and_a_minute(phase: str) -> None:
    assert passed_limit(Status(phase, 0.0, 79.0, 0, {}), 0.0, 1.0, CONFIG, {}) is None
    said = passed_limit(Status(phase, 0.0, 81.0, 0, {}), 0.0, 1.0, CONFIG, {})
    assert said == "an operation on storage has not ended for 81 s"
