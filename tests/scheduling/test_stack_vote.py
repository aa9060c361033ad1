"""Which versions count where cards differ, and why a card that has others is refused by name."""

from __future__ import annotations

from collections import Counter

from gaudi_batch.scheduling.admission import Requirements
from gaudi_batch.scheduling.events import LoadedCard
from gaudi_batch.scheduling.stack_vote import STACK_VOTE_TIMEOUT_S, Stack, StackVote


def test_another_generation_of_cards_and_a_package_that_is_missing_are_named() -> None:
    needs = Requirements("m", "r")
    stack = {"device": "hpu GAUDI2", "torch": "2.10.0"}
    loaded = LoadedCard("node-2-0", "id", "node-2", 0, stack, model="r", cpus=4)
    assert needs.why_unfit(loaded, stack) == ""
    assert needs.why_unfit(loaded, {"device": "hpu GAUDI3", "torch": "2.10.0", "ftfy": "6.3"}) == (
        "node node-2 would make other images: device is hpu GAUDI2, and hpu GAUDI3 in this run;"
        " ftfy is missing, and 6.3 in this run; every node needs the same"
    )


def test_cards_that_differ_wait_for_a_bounded_time() -> None:
    vote, ours, other = StackVote(None), Stack({"torch": "1"}), Stack({"torch": "2"})
    vote.count(Counter([ours]), True, 100.0)
    vote.count(Counter([ours, other]), True, 99.9 + STACK_VOTE_TIMEOUT_S)
    assert (vote.stack, vote.settled) == (ours, False)
    vote.count(Counter([ours, other]), True, 100.0 + STACK_VOTE_TIMEOUT_S)
    vote.count(Counter([ours, other, other]), False, 200.0 + STACK_VOTE_TIMEOUT_S)
    assert (vote.stack, vote.settled) == (ours, True), "what has made images is not put out by those that come later"


def test_the_stack_that_made_the_images_before_comes_before_what_most_have() -> None:
    vote, before, other = StackVote({"torch": "1"}), Stack({"torch": "1"}), Stack({"torch": "2"})
    vote.count(Counter([other, other]), False, 0.0)
    assert (vote.stack, vote.settled) == (other, False)
    vote.count(Counter([other, other, before]), False, 1.0)
    assert (vote.stack, vote.settled) == (before, True)
