"""What a card's process has done is counted once, also where another process takes its place."""

from __future__ import annotations

from gaudi_batch.card.work import CardWork


def test_work_of_a_process_that_took_the_place_of_another_is_all_new() -> None:
    before = CardWork().with_batch("warmup", 50.0, 50.0)
    after = CardWork().with_batch("steady", 60.0, 0.1).with_images(8)
    new = after.since(before)
    assert (new.images, new.generate_s, new.wait_s) == (8, 60.0, 0.1)
    assert all(count >= 0 for counts in new.batches.values() for count in counts)
    assert after.with_batch("steady", 1.0, 0.5).since(after).wait_s == 0.5
