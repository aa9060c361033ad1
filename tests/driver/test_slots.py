"""What a card is called when Ray moves its place, and which may work. The driver alone, without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from gaudi_batch.card.messages import Ready
from gaudi_batch.driver.calls import send
from gaudi_batch.driver.fleet import Fleet
from gaudi_batch.driver.slot import Slot
from gaudi_batch.plan import Bucket, Shard
from gaudi_batch.scheduling.admission import Requirements
from gaudi_batch.scheduling.cards import CardState
from gaudi_batch.scheduling.decisions import Assign, ShardTask
from gaudi_batch.scheduling.events import CardDied, CardPlaced, Event, ShardMade, ShardOutcome
from gaudi_batch.scheduling.schedule import Schedule
from gaudi_batch.scheduling.state import RowCounts, Rules


class Introducing(Fleet):
    """The cards of a run that only says what they have loaded."""

    def __init__(self, before: Mapping[str, str] | None = None, cards: int = 2) -> None:
        plan = [Shard(number, 0, 4 * number, 4 * number + 4, Bucket(64, 64, 20, 2.0), 4, 4) for number in range(9)]
        self.schedule = Schedule(plan, "a", RowCounts(36), Rules(requirements=Requirements(stack=before)))
        self.slots = {number: Slot(number) for number in range(cards)}
        self.sent: list[Assign] = []
        for number in self.slots:
            self.tell(CardPlaced(number, "first"))
        self._tell = self.tell

    def tell(self, event: Event) -> None:
        self.sent += [each for each in self.schedule.handle(event) if isinstance(each, Assign)]

    def ready(self, number: int, node: str, module: int, torch: str = "2") -> str:
        stack = {"torch": torch}
        ready = Ready(f"{node}-id", node, module, pid=1, load_s=0.0, stack=stack, model="", threads=None, cpus=1)
        self.introduce(self.slots[number], ready)
        return self.slots[number].name


def test_a_card_whose_place_was_moved_gets_the_name_of_where_it_is() -> None:
    driver = Introducing()
    assert driver.ready(0, "first", 3) == "first-3"
    driver.tell(CardDied(0, "killed"))
    assert driver.ready(0, "first", 3) == "first-3", "a new process in the same place"
    driver.tell(CardDied(0, "killed"))
    assert driver.ready(0, "second", 5) == "second-5"
    assert driver.slots[0].node_id == "second-id"
    assert driver.ready(1, "first", 3) == "first-3", "another card may have come to its old place"


def states(driver: Introducing) -> list[CardState]:
    return [driver.schedule.state(number) for number in driver.slots]


READY, WAITS, REFUSED = CardState.READY, CardState.STARTING, CardState.QUARANTINED


def test_an_odd_card_that_loads_first_puts_out_no_other_of_a_resumed_run() -> None:
    driver = Introducing({"torch": "2"}, cards=4)
    driver.ready(0, "odd", 0, torch="1")
    assert states(driver) == [WAITS, WAITS, WAITS, WAITS], "it waits for the others' word"
    driver.ready(1, "first", 0)
    driver.ready(2, "second", 0)
    driver.ready(3, "odd", 1, torch="1")
    assert states(driver) == [REFUSED, READY, READY, REFUSED]


def test_a_resumed_run_goes_on_with_what_most_cards_have_when_none_has_what_was() -> None:
    driver = Introducing({"torch": "2"}, cards=4)
    driver.ready(0, "odd", 0, torch="1")
    driver.ready(1, "first", 0, torch="3")
    driver.ready(2, "second", 0, torch="3")
    assert states(driver) == [WAITS] * 4, "the last may have what made the images before"
    for _ in range(3):
        driver.tell(CardDied(3, "killed"))
    assert states(driver) == [WAITS, READY, READY, REFUSED]
    driver.tell(ShardMade(driver.sent[0].task.attempt, ShardOutcome(4, 0, 0)))
    assert states(driver) == [REFUSED, READY, READY, REFUSED]


def test_an_odd_card_that_loads_first_puts_out_no_other_of_a_new_run() -> None:
    driver = Introducing(cards=3)
    driver.ready(0, "odd", 0, torch="1")
    assert states(driver) == [READY, WAITS, WAITS], "where all so far agree, the first works at once"
    driver.ready(1, "first", 0)
    assert states(driver) == [READY, WAITS, WAITS]
    driver.ready(2, "second", 0)
    assert states(driver) == [REFUSED, READY, READY]


def test_shards_reach_a_card_in_the_order_in_which_they_were_sent() -> None:
    """A card's calls run side by side, and the schedule takes the first for the one that it works on."""
    asked: list[str] = []

    class Actor:
        @property
        def assign(self) -> Actor:
            return self

        async def remote(self, name: str, task: ShardTask) -> None:
            if task.attempt == "a0":
                await asyncio.sleep(0)  # others are sent meanwhile
                await asyncio.sleep(0)
            asked.append(task.attempt)

    async def send_all() -> None:
        driver, slot = Introducing(), Slot(0)
        shard = driver.schedule.shards[0]
        await asyncio.gather(*(send(slot, Actor(), ShardTask(shard, f"a{n}")) for n in range(3)))

    asyncio.run(send_all())
    assert asked == ["a0", "a1", "a2"]
