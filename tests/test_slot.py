"""When a card has taken too long: each phase has its limit, and that of batches follows what has been seen."""

from __future__ import annotations

import pytest

from gaudi_batch.config import LimitsConfig
from gaudi_batch.messages import Status
from gaudi_batch.plan import GraphKey
from gaudi_batch.slot import BATCH_LIMIT_FACTOR, phase_limit

LIMITS = LimitsConfig(loading=100, first_batch=50, batch=10)
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
        return phase_limit(status, since_heard, LIMITS, seen)

    assert after(limit - 1, 0.5) is None
    assert after(limit - 1, 2) == f"its {phase} took longer than {limit:g} s (limits.{name})"
    assert after(limit + 1, 0) is not None


def test_a_card_that_has_nothing_to_do_has_no_limit() -> None:
    assert phase_limit(Status("idle", 1e9, 0.0, 0, {}), 0.0, LIMITS, {}) is None
