"""What `check` prints: a job's plan, its buckets, the share of padding, and a guess at how long it takes."""

from __future__ import annotations

from gaudi_batch.job import DEFAULT_CARDS, Job
from gaudi_batch.plan import summarize
from gaudi_batch.text import duration, name

BUCKETS_SHOWN = 20


def check(job: Job) -> str:
    """Describes a resolved job; starts nothing.

    Raises:
        InputError: its shape columns can't be read.
    """
    config, model = job.config, job.model
    buckets = summarize(job.plan(), config.batch_size)
    plans = buckets.values()
    images, padding = sum(plan.images for plan in plans), sum(plan.padding for plan in plans)
    batches = sum(plan.batches for plan in plans)
    columns = [ours if ours == theirs else f"{ours}={name(theirs)}" for ours, theirs in job.dataset.columns.items()]
    carried = (
        f"; carried: {', '.join(name(each) for each in job.dataset.carried.names)}" if job.dataset.carried.names else ""
    )
    lines = [
        f"prompts  {job.total_rows} rows of {job.dataset.rows} in {len(job.dataset.files)} files",
        f"columns  {', '.join(columns)}{carried}",
        f"model    {name(model.name)}: {model.pipeline_class}" + (f", {model.scheduler}" if model.scheduler else ""),
        f"device   {config.device}, {job.dtype}"
        + (f", {job.threads} threads a card" if config.device == "cpu" else ""),
        f"output   {config.format}, {config.encoding.type}",
        f"plan     {images} images in {sum(plan.shards for plan in plans)} shards and {batches} batches of"
        f" {config.batch_size}, padding {padding / max(1, padding + images):.2%}",
    ]
    for bucket, plan in list(buckets.items())[:BUCKETS_SHOWN]:
        lines.append(
            f"bucket   {bucket}: {plan.rows} rows, {plan.images} images, {plan.shards} shards,"
            f" padding {plan.padding_share:.2%}"
        )
    if len(buckets) > BUCKETS_SHOWN:
        lines.append(f"bucket   and {len(buckets) - BUCKETS_SHOWN} more")
    lines.append(f"time     {_estimate(job, batches)}")
    return "\n".join(lines)


def _estimate(job: Job, batches: int) -> str:
    config = job.config
    if config.device != "simulated":
        return "not known before a first run: try the job with --limit and look at its summary.json"
    cards = DEFAULT_CARDS if config.cards == "all" else config.cards
    seconds = -(-batches // cards) * config.simulated.batch_seconds
    return f"about {duration(seconds)} on {cards} cards, warm-up left out"
