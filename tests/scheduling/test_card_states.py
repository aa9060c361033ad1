"""The life of a card is a table, and its picture in the docs is drawn from it."""

from __future__ import annotations

from helpers import REPOSITORY

from gaudi_batch.scheduling.cards import TRANSITIONS, Card, CardChange, CardState, state_diagram


def test_the_picture_in_the_docs_is_that_of_the_table() -> None:
    assert f"```mermaid\n{state_diagram()}\n```" in (REPOSITORY / "docs/architecture.md").read_text()


def test_a_card_may_change_as_the_table_says_and_in_no_other_way() -> None:
    for state in CardState:
        for change in CardChange:
            assert Card(0, "", state).may(change) is ((state, change) in TRANSITIONS)


def test_every_life_of_a_card_can_end() -> None:
    for state in set(CardState) - {CardState.GONE}:
        reached, before = {state}, set[CardState]()
        while reached != before:
            before, reached = reached, reached | {after for (at, _), after in TRANSITIONS.items() if at in reached}
        assert CardState.GONE in reached
