"""How a driver of a run ended, for whoever is told."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from gaudi_batch.driver.run_context import Run
from gaudi_batch.driver.signals import INTERRUPTED
from gaudi_batch.errors import GaudiBatchError, Interrupted
from gaudi_batch.output.cost import money
from gaudi_batch.redaction import redact
from gaudi_batch.text import counted, describe_error, duration, one_line


@dataclass(frozen=True)
class Outcome:
    """How a driver of a run ended, as the JSON has it. What is not known is None."""

    output: str
    run_id: str
    state: str
    """As in summary.json: `complete`, `complete with failed rows` or `stopped`."""
    reason: str | None
    """Why it is not complete, or has failed otherwise."""
    exit_code: int
    message: str
    """The outcome in sentences."""
    images: int | None
    images_planned: int
    rows: int | None
    rows_planned: int
    failed_rows: int | None
    started_at: str | None
    ended_at: str | None
    wall_s: float | None
    images_per_s_wall: float | None
    card_hours: float | None
    cost: float | None
    energy_j: float | None
    version: str

    @classmethod
    def of(cls, run: Run, error: BaseException | None) -> Outcome:
        """The outcome of a run.

        Args:
            run: the run.
            error: what ended it; None if it is complete.
        """
        summary = run.summary or {}
        state, reason = summary.get("state", "stopped"), summary.get("reason")
        if error is not None:
            reason = reason or one_line(redact(_words(error)))
        figures = {
            name: summary.get(name)
            for name in (
                *("images", "rows", "failed_rows", "started_at", "ended_at", "wall_s"),
                *("images_per_s_wall", "card_hours", "cost", "energy_j"),
            )
        }
        output = redact(run.ledger.storage.url)
        return cls(
            output=output,
            run_id=run.info.run_id,
            state=state,
            reason=reason,
            exit_code=_exit_code(error, summary),
            message=_sentences(output, state, reason, figures),
            images_planned=run.info.images,
            rows_planned=run.info.rows,
            version=importlib.metadata.version("gaudi-batch"),
            **figures,
        )

    def json(self) -> bytes:
        """The outcome as JSON."""
        return json.dumps(asdict(self)).encode()

    def slack(self) -> bytes:
        """The outcome as Slack takes it, where these characters stand for marks."""
        text = f"gaudi-batch: {self.message}"
        for character, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
            text = text.replace(character, entity)
        return json.dumps({"text": text}).encode()


def _words(error: BaseException) -> str:
    if isinstance(error, GaudiBatchError):
        return str(error)
    return INTERRUPTED if isinstance(error, KeyboardInterrupt) else describe_error(error)


def _exit_code(error: BaseException | None, summary: Mapping[str, Any]) -> int:
    """What the command line returns."""
    if error is None:
        return 3 if summary.get("failed_rows") else 0
    if isinstance(error, GaudiBatchError):
        return error.exit_code
    return Interrupted.exit_code if isinstance(error, KeyboardInterrupt) else 1


def _sentences(output: str, state: str, reason: str | None, figures: Mapping[str, Any]) -> str:
    sentences = [f"{output} is {state}" + (f": {reason}" if reason else "")]
    if figures["images"] is not None:
        made = f"{counted(figures['images'], 'image')} and {counted(figures['failed_rows'], 'failed row')}"
        took = "" if figures["wall_s"] is None else f" in {duration(figures['wall_s'])}"
        rate = "" if figures["images_per_s_wall"] is None else f", {figures['images_per_s_wall']:.2f} images/s"
        sentences.append(f"It has {made}{took}{rate}")
    if figures["cost"] is not None:
        sentences.append(f"It cost {money(figures['cost'])}")
    return " ".join(f"{sentence}." for sentence in sentences)
