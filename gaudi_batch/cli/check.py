"""The text of `check`: a job's rows and plan, the content of its output, and an estimate of its time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gaudi_batch.cli.estimate import TuneRecord, estimate, speeds_of_commits, speeds_of_summary
from gaudi_batch.cli.expected_cost import CARDS_OF_NODE, Work, money_lines
from gaudi_batch.cluster.devices import with_device
from gaudi_batch.config.schema import JobConfig
from gaudi_batch.dataset.reasons import reason_lines
from gaudi_batch.dataset.survey import survey
from gaudi_batch.driver.growth import adds_to, plan_rest, why_not_resumed
from gaudi_batch.driver.spending import Spending
from gaudi_batch.job import DEFAULT_CARDS, Job, resolve
from gaudi_batch.output.place import refuse_file, require_writable
from gaudi_batch.output.reader import OutputReader
from gaudi_batch.output.run_info import RunInfo
from gaudi_batch.plan import Bucket, PlanSummary, Shard, summarize
from gaudi_batch.reporting.status import describe_verify, read_status
from gaudi_batch.storage.store import Storage
from gaudi_batch.text import counted, duration, printable, quote_if_unprintable

BUCKETS_SHOWN = 20
REASONS_SHOWN = 10
CHECK_RETRY_TIMEOUT_S = 10.0
"""Seconds for which an output that fails is tried again."""
WAYS_TO_KNOW = (
    "`gaudi-batch tune` with the job file measures a card, or run the job with --limit and look again, which makes"
    " nothing twice"
)


@dataclass(frozen=True)
class Checked:
    """The result of a check."""

    text: str
    """The text, several lines."""
    refused: str | None
    """Why the job would not run; None if it would."""


@dataclass(frozen=True)
class _Place:
    """The content of an output."""

    lines: list[str]
    refused: str | None = None
    plan: list[Shard] | None = None
    """The shards of the run that the job would resume, with those that it adds; None if there is no run."""
    complete: bool = False
    """Whether the run has nothing left to make."""
    summary: Mapping[str, Any] | None = None


def check(config: JobConfig, strict: bool = False, job_file: str | None = None) -> Checked:
    """Checks a job: reads all its rows and tries to write to its output; starts nothing and leaves nothing behind.

    Args:
        config: the job.
        strict: whether a single row that can't be run refuses it; carried columns are read then, too, as `run
            --strict` does.
        job_file: the file that the job came from, beside which `tune` keeps its figures; None if there is none.

    Raises:
        InputError: it can't be run as it is, its shape columns can't be read, or its output can't be where it is to be.
        StorageError: storage failed.
    """
    spending = Spending(config, "")
    storage = Storage(config.output, config.storage_options, min(CHECK_RETRY_TIMEOUT_S, config.storage_patience))
    refuse_file(storage)
    require_writable(storage)
    ledger = OutputReader(storage)
    record = ledger.run()
    if record is None:
        spending.refuse_if_over()
    job = resolve(
        with_device(config, None, record.job["device"] if record else None),
        record.fixed if record else None,
        offline=True,
    )
    config, model = job.config, job.model
    place = _examine_output(ledger, record, job)
    rows = survey(job.dataset, job.rules, config.limit, every_column=strict)
    cards = _cards(job, place)
    plan = job.plan(config.max_cards or cards or CARDS_OF_NODE) if place.plan is None else place.plan
    buckets = summarize(plan, config.batch_size)
    plans = buckets.values()
    images, padding = sum(each.images for each in plans), sum(each.padding for each in plans)
    batches, shards = sum(each.batches for each in plans), sum(each.shards for each in plans)
    columns = [
        name if name == column else f"{name}={quote_if_unprintable(column)}"
        for name, column in job.dataset.columns.items()
    ]
    carried = (
        f"; carried: {', '.join(quote_if_unprintable(each) for each in job.dataset.carried.names)}"
        if job.dataset.carried.names
        else ""
    )
    lines = [
        f"prompts  {job.total_rows} rows of {job.dataset.rows} in {counted(len(job.dataset.files), 'file')}",
        f"columns  {', '.join(columns)}{carried}",
        f"rows     {rows.rows - rows.bad} can be run, {rows.bad} can't",
    ]
    lines += [f"bad      {line}" for line in reason_lines(rows.reasons[:REASONS_SHOWN])]
    lines += [f"bad      first of them: {rows.examples}"] if rows.bad else []
    lines += [f"ids      {rows.repeated}"] if rows.repeated else []
    lines += [
        f"model    {quote_if_unprintable(model.name)}: {_kind(job)}"
        + (f", {model.scheduler}" if model.scheduler else ""),
        *(
            f"lora     {quote_if_unprintable(lora.name)}, {lora.weight_name}, scale {lora.scale:g}"
            for lora in model.loras
        ),
        f"device   {config.device}, {job.dtype}"
        + (f", mode {config.gaudi.mode}" if config.device == "hpu" and config.gaudi.mode != "lazy" else "")
        + (f", {job.threads} threads a card" if config.device == "cpu" else ""),
        f"output   {config.format}, {config.encoding.type}",
        *place.lines,
        f"plan     {counted(images, 'image')} in {counted(shards, 'shard')} and"
        f" {counted(batches, 'batch', 'batches')} of {config.batch_size},"
        f" padding {padding / max(1, padding + images):.2%}"
        + (f"; those of {counted(rows.bad, 'row')} that can't be run are counted, too" if rows.bad else ""),
    ]
    for bucket, part in list(buckets.items())[:BUCKETS_SHOWN]:
        lines.append(
            f"bucket   {bucket}: {counted(part.rows, 'row')}, {counted(part.images, 'image')},"
            f" {counted(part.shards, 'shard')}, padding {part.padding_share:.2%}"
        )
    if len(buckets) > BUCKETS_SHOWN:
        lines.append(f"bucket   and {len(buckets) - BUCKETS_SHOWN} more")
    lines += _idle_cards(job, cards, shards, batches, place)
    time_lines, work = _time(place, buckets, cards, TuneRecord(job, job_file), ledger)
    spending.read_earlier(ledger)
    lines += time_lines + money_lines(work, spending, (place.summary or {}).get("cards") or {})
    refused = place.refused
    if rows.bad == rows.rows:
        refused = refused or f"no row can be run: {rows.examples}"
    elif strict and rows.bad:
        refused = refused or rows.refusal
    return Checked("\n".join(map(printable, lines)), refused)


def _kind(job: Job) -> str:
    model, config = job.model, job.config
    if model.looked_at:
        return model.pipeline_class if model.scheduler is None else f"{model.family.name}, {model.pipeline_class}"
    guessed = [name for name in ("steps", "guidance_scale", "dtype") if getattr(config, name) is None]
    as_if = f"; {', '.join(guessed)}: as if it were Stable Diffusion 1 or 2" if guessed else ""
    return f"{model.pipeline_class}; negative prompts and guidance were not judged{as_if}"


def _examine_output(ledger: OutputReader, record: RunInfo | None, job: Job) -> _Place:
    """Looks at what is in the output, which can be written."""
    url = ledger.storage.url
    if record is None:
        if ledger.manifests():
            return _Place([], f"{url} has manifests of a run and no run.json; bring it back, or name another")
        return _Place(["place    can be written; no run is there"])
    status, summary = read_status(ledger), ledger.get_json("summary.json")
    made = f"{status['images_committed']} of {status['images_planned']} images are made"
    speed = ""
    if rate := (summary or {}).get("images_per_s"):
        speed = f", at {rate:.2f} images/s of generation"
    elif rate := status["images_per_s"]:
        speed = f", at {rate:.2f} images/s in the last minute of its driver"
    lines = [f"place    can be written; a run of {record.created_at} is there, {status['state']}: {made}{speed}"]
    if status["verify"]:
        lines.append(f"verified {describe_verify(status['verify'], status['shards_committed'])}")
    if refusal := why_not_resumed(ledger, record, job):
        return _Place(lines, refusal)
    left = status["shards"] - status["shards_committed"]
    if job.total_rows > record.rows:
        lines.append(f"resume   this job resumes it and adds {counted(job.total_rows - record.rows, 'row')}")
        left += 1
    elif left:
        lines.append(f"resume   this job makes the other {counted(left, 'shard')}")
    else:
        lines.append("resume   this job finds nothing left to make")
    stored = ledger.plan(record.rows)
    cards = job.config.max_cards or _cards(job, _Place([], summary=summary)) or CARDS_OF_NODE
    plan = [*stored, *plan_rest(stored, record, job, cards)] if adds_to(record, job) else stored
    # Shards that make rows again hold none that are not counted already.
    plan = [shard for shard in plan if not shard.is_rerun]
    return _Place(lines, None, plan, left == 0, summary)


def _cards(job: Job, place: _Place) -> int | None:
    """How many cards the job will have, as far as known before it begins."""
    config = job.config
    if config.cards != "all":
        return config.cards
    used = len((place.summary or {}).get("cards") or {})
    if used:
        return used
    return DEFAULT_CARDS if config.device in ("cpu", "simulated") else config.min_cards or None


def _idle_cards(job: Job, cards: int | None, shards: int, batches: int, place: _Place) -> list[str]:
    """A warning if some cards will have nothing to do."""
    if cards is None or place.plan is not None or shards >= cards or not batches:
        return []
    idle = f"cards    {cards - shards} of {cards} cards will be idle: the plan has {counted(shards, 'shard')}"
    if job.config.shard_size is None or batches < cards:
        return [f"{idle} of {counted(batches, 'batch', 'batches')} in all; fewer --cards will do"]
    return [f"{idle}; without --shard-size every card gets work"]


def _time(
    place: _Place, buckets: Mapping[Bucket, PlanSummary], cards: int | None, record: TuneRecord, ledger: OutputReader
) -> tuple[list[str], Work]:
    """How long the job will take; never a guess where nothing was measured."""
    if place.complete:
        return ["time     none: all is made"], Work(0.0, cards)
    config, plan = record.job.config, buckets
    sources, images = [record.speeds()], ""
    if place.plan is not None:
        committed = set(ledger.committed_shards())
        plan = summarize((shard for shard in place.plan if shard.number not in committed), config.batch_size)
        images = f" for {counted(sum(part.images for part in plan.values()), 'image')}"
        of_run = speeds_of_summary(place.summary or {}) or speeds_of_commits(ledger, place.plan)
        sources.insert(0, of_run)
    cards = config.max_cards or cards
    shards = sum(part.shards for part in plan.values())
    problem = [f"tune     {record.problem}"] if record.problem else []
    if measured := estimate(plan, config.batch_size, sources):
        at_work = cards and max(1, min(cards, shards))
        work = Work(measured.card_s, at_work, not measured.unknown, cards)
        return [*problem, f"time     {measured.text(at_work, images)}"], work
    if config.device == "simulated":
        batches = sum(part.batches for part in plan.values())
        held = cards or DEFAULT_CARDS
        at_work = max(1, min(held, shards))
        seconds = math.ceil(batches / at_work) * config.simulated.batch_seconds
        line = f"time     about {duration(seconds)} on {counted(at_work, 'card')}, warm-up left out"
        return [*problem, line], Work(seconds * at_work, at_work, held=held)
    first = "not known before a first run" if place.plan is None else "not known yet"
    why = record.why_not()
    return [*problem, f"time     {first}" + (f": {why}" if why else "") + f"; {WAYS_TO_KNOW}"], Work(None, cards)
