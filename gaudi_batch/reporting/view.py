"""The progress of a run as a picture of a bounded number of lines: the bar, the cards, the last faults.

`run` draws it under its log, and `status --watch` alone on the terminal; both from what progress.json says. All names
and errors are text: nothing in them is markup, or steers the terminal.
"""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from gaudi_batch.reporting.progress_text import (
    GONE,
    Record,
    counts,
    fault_line,
    number,
    progress_line,
    rate,
    share_of_limit,
)
from gaudi_batch.text import printable, short_hosts

FAULTS_SHOWN = 5
FEWER_FAULTS = 3
"""On a terminal of fewer than `LARGE_HEIGHT` lines."""
LARGE_HEIGHT = 30
MAX_NAME_WIDTH = 32
MIN_WIDTH = 12
"""Columns of a terminal below which nothing can be read."""
NO_BREAK = "\u00a0"
NEAR_LIMIT = 0.5
"""A card that has used this share of its time is shown before all others."""
STYLES = {"ready": "green", "quarantined": "bold red", GONE: "dim", "starting": "yellow", "leaving": "yellow"}
"""Of the states of cards."""
ORDER = ("quarantined", "starting", "leaving", "ready", "waiting for the cluster", GONE)
"""States of cards in which nothing is wrong, from those that a person wants to see first."""


class _Column(NamedTuple):
    title: str
    field: str
    always: bool = True
    """Whether it is there although no card has a value for it."""


NUMBERS = (
    _Column("images", "images"),
    _Column("images/s", "images_per_s"),
    _Column("°C", "temperature_c", False),
    _Column("W", "watts", False),
    _Column("faults", "faults"),
)


class RunView:
    """The picture, which fits the width of its terminal.

    Args:
        record: what progress.json says.
        height: share of the terminal's lines that it may take, above 0 and at most 1.
        title: a line above it.
        notes: lines under the progress.
    """

    def __init__(self, record: Record, height: float, title: str = "", notes: Sequence[str] = ()) -> None:
        self._record = record
        self._height = height
        self._title = title
        self._notes = notes

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        height = max(4, int((options.size.height - 1) * self._height))
        yield from self.lines(options.max_width, height)

    def lines(self, width: int, height: int) -> list[Text]:
        """Its lines, each no wider than that; none where nothing could be read."""
        if width < MIN_WIDTH:
            return []
        head = [Text(fit(self._title, width), "bold")] if self._title else []
        if self._record.get("time") is not None:
            head.append(_bar(self._record, width))
            # A line ends between two figures and not within one.
            parts = [part.replace(" ", NO_BREAK) for part in progress_line(self._record).split(", ")]
            head += _wrapped(", ".join(parts), width, "")
        for note in self._notes:
            head += _wrapped(note, width, "yellow")
        faults = self._record["faults"][-(FAULTS_SHOWN if height >= LARGE_HEIGHT else FEWER_FAULTS) :]
        foot = [Text(fit(f"fault {fault_line(fault)}", width), "red") for fault in faults]
        cards = _cards(self._record["cards"], width, height - len(head) - len(foot))
        return [*head, *cards, *foot][:height]


def fit(text: str, width: int) -> str:
    """A text that takes at most so many cells; what is cut off is shown by an ellipsis."""
    text = printable(text)
    return text if cell_len(text) <= width else f"{set_cell_size(text, max(0, width - 1))}…"[:width]


def _wrapped(text: str, width: int, style: str) -> list[Text]:
    lines = [line.replace(NO_BREAK, " ") for line in textwrap.wrap(text, width)]
    return [Text(fit(line, width), style) for line in lines]


def _bar(record: Record, width: int) -> Text:
    # Images of failed rows are made no more, and no one waits for them.
    total, left = record.get("images_total") or 0, record.get("images_left")
    if left is None:  # of an older driver
        left = total - (record.get("images") or 0) - (record.get("images_missing") or 0)
    done = total - left
    share = min(1.0, max(0.0, done / total)) if total else 0.0
    percent = f" {math.floor(1000 * share) / 10:5.1f} %"  # 100 % is for what is complete
    cells = max(1, width - len(percent))
    full = int(cells * share)
    return Text.assemble(("━" * full, "green"), ("━" * (cells - full), "bright_black"), percent)


def _cards(cards: Mapping[str, Mapping[str, Any]], width: int, height: int) -> list[Text]:
    """A table of cards in so many lines: all of them, or the worst, and how many others there are."""
    if not cards or height < 1:
        return []
    names = list(cards)
    if len(cards) + 1 > height:
        names.sort(key=lambda name: _worst_first(name, cards[name]))
        names, others = names[: max(0, height - 2)], names[max(0, height - 2) :]
    else:
        others = []
    lines = _table({name: cards[name] for name in names}, cards, width) if names else []
    if others:
        more = Counter(str(cards[name].get("state")) for name in others)
        text = f"{'and ' if names else ''}{len(others)} {'more' if names else 'cards'}: {counts(more)}"
        lines.append(Text(fit(text, width), "dim"))
    return lines


def _table(rows: Mapping[str, Mapping[str, Any]], cards: Mapping[str, Mapping[str, Any]], width: int) -> list[Text]:
    columns = [column for column in NUMBERS if column.always or any(_is_known(card, column) for card in cards.values())]
    cells = {name: [_value(card, column) for column in columns] for name, card in rows.items()}
    widths = [
        max(len(column.title), *(len(row[place]) for row in cells.values())) for place, column in enumerate(columns)
    ]
    short = short_hosts(node for card in cards.values() if isinstance(node := card.get("node"), str))
    labels = {name: name.replace(node, short.get(node, node)) for name, node in _nodes(rows)}
    name_width = min(MAX_NAME_WIDTH, width // 4, max(4, *(cell_len(printable(label)) for label in labels.values())))
    state_width = max(5, width - name_width - 1 - sum(each + 1 for each in widths))

    def line(name: str, state: str, numbers: Sequence[str], style: str) -> Text:
        first = set_cell_size(_fit_end(name, name_width), name_width)
        second = set_cell_size(fit(state, state_width), state_width)
        rest = "".join(f" {value:>{each}}" for value, each in zip(numbers, widths, strict=True))
        row = Text.assemble(first, " ", (second, style), rest)
        row.truncate(width)
        return row

    header = line("card", "state", [column.title for column in columns], "")
    header.stylize("dim")
    return [
        header,
        *(line(labels[name], _state(card, state_width), cells[name], _style(card)) for name, card in rows.items()),
    ]


def _nodes(rows: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    for name, card in rows.items():
        yield name, str(card.get("node") or name)


def _fit_end(name: str, width: int) -> str:
    """A name that keeps its end, which tells the cards of a node apart."""
    name = printable(name)
    if cell_len(name) <= width:
        return name
    while name and cell_len(name) >= width:
        name = name[1:]
    return f"…{name}"


def _is_known(card: Mapping[str, Any], column: _Column) -> bool:
    return isinstance(card.get(column.field), (int, float))


def _value(card: Mapping[str, Any], column: _Column) -> str:
    value = card.get(column.field)
    if not isinstance(value, (int, float)):
        return "-"
    return rate(value) if column.field == "images_per_s" else number(round(value))


def _state(card: Mapping[str, Any], width: int) -> str:
    """The state of a card and what it does; the latter alone where there is not the room for both."""
    throttled = f"throttled ({card['throttled']}); " if card.get("throttled") else ""
    state, doing = card.get("state") or "-", card.get("doing")
    if not doing:
        return f"{throttled}{state}"
    whole = f"{throttled}{state}: {doing}"
    return whole if cell_len(whole) <= width else f"{throttled}{doing}"


def _style(card: Mapping[str, Any]) -> str:
    if share_of_limit(card) >= NEAR_LIMIT or card.get("throttled"):
        return "red"
    return STYLES.get(str(card.get("state")), "")


def _worst_first(name: str, card: Mapping[str, Any]) -> tuple[float, ...] | tuple[Any, ...]:
    """Sorts the cards that a person should see to the front: near their limits, with faults, slow."""
    state = card.get("state")
    share = share_of_limit(card)
    is_gone = state == GONE
    is_near = share >= NEAR_LIMIT
    faults = 0 if is_gone else (card.get("faults") or 0) + bool(card.get("throttled"))
    speed = card.get("images_per_s")
    return (
        not is_near,
        -share if is_near else 0.0,
        state != "quarantined",
        not faults,
        ORDER.index(state) if state in ORDER else 0,
        -faults,
        math.inf if speed is None else speed,
        name,
    )
