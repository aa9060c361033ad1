"""How long a job will take, from what has been measured: by the cards of its run, or by `tune`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gaudi_batch.bench.record import Conditions, Measurement, read_record, record_path
from gaudi_batch.errors import InputError
from gaudi_batch.job import Job
from gaudi_batch.output.reader import OutputReader
from gaudi_batch.output.throughput import ThroughputTotals
from gaudi_batch.pipelines.sources import NOT_LOOKED_AT
from gaudi_batch.plan import BatchKind, Bucket, PlanSummary, Shard
from gaudi_batch.text import counted, duration, short_repr

MAX_COMMITS_READ = 64
"""Manifests that are read of a run without a summary."""
SHA256_DIGITS = 64
KINDS_SHOWN = 3


@dataclass(frozen=True)
class Speed:
    """How fast a card makes batches of one kind."""

    images_per_s: float
    source: str
    """What measured it, in words."""
    fills_up: bool = False
    """Whether images that fill up short batches were counted as well."""
    steady: bool = True
    """Whether batches that compile were left out."""
    scaled_from: int | None = None
    """The steps that were measured, if these are others."""

    def scaled(self, from_steps: int, to_steps: int) -> Speed:
        """The speed with other steps, in proportion to them."""
        if from_steps == to_steps:
            return self
        rate = self.images_per_s * from_steps / to_steps
        return Speed(rate, self.source, self.fills_up, self.steady, from_steps)


Speeds = Mapping[BatchKind, Speed]


def speeds_of_summary(summary: Mapping[str, Any]) -> dict[BatchKind, Speed]:
    """Of each kind of batch in a run's summary.json."""
    speeds = {}
    for each in summary.get("buckets") or ():
        kind = BatchKind(*(each.get(name) for name in BatchKind._fields))
        steady = each.get("card_images_per_s")
        if None in kind:
            continue  # an older version has written less
        if rate := steady or each.get("card_images_per_s_with_warmup"):
            speeds[kind] = Speed(rate, "from the run in the output", steady=bool(steady))
    return speeds


def speeds_of_commits(ledger: OutputReader, plan: Iterable[Shard]) -> dict[BatchKind, Speed]:
    """Of each kind of batch in a run without a summary, from the last shards that it has committed."""
    buckets = {shard.number: shard.bucket for shard in plan}
    sums: dict[BatchKind, ThroughputTotals] = {}
    for number in [number for number in ledger.committed_shards() if number in buckets][-MAX_COMMITS_READ:]:
        commit = ledger.read_commit(number)
        if commit is not None:
            kind = buckets[number].batch_kind
            sums[kind] = sums.get(kind, ThroughputTotals()) + commit[0].sums
    rows = [
        {
            **kind._asdict(),
            "card_images_per_s": total.images_per_s,
            "card_images_per_s_with_warmup": total.images_per_s_with_warmup,
        }
        for kind, total in sums.items()
    ]
    return speeds_of_summary({"buckets": rows})


class TuneRecord:
    """What `tune` has measured for a job.

    Args:
        job: the job.
        job_file: the file that it came from; None if there is none.
    """

    def __init__(self, job: Job, job_file: str | None) -> None:
        self.job = job
        self.problem: str | None = None
        """Why the record can't be read; None if it can, or there is none."""
        self._measurements: Sequence[Measurement] = ()
        try:
            self._measurements = read_record(record_path(Path(job_file))) if job_file is not None else ()
        except InputError as error:
            self.problem = str(error)

    def speeds(self) -> dict[BatchKind, Speed]:
        """Of each kind of batch that was measured as the job makes it; of two measurements of a kind the later one."""
        speeds = {}
        for each in self._measurements:
            if each.batch_size == self.job.config.batch_size and not self._differences(each):
                on = "" if each.device_name == each.conditions.device else f" on {each.device_name}"
                source = f"from tune of {each.time.partition('T')[0]}{on}"
                speeds[each.kind] = Speed(each.images_per_s, source, fills_up=True)
        return speeds

    def why_not(self) -> str | None:
        """Why its measurements say nothing of the job; None if there are none."""
        nearest = min(self._measurements, key=lambda each: len(self._differences(each)), default=None)
        if nearest is None:
            return None
        of = f"tune of {nearest.time.partition('T')[0]} has measured"
        if different := self._differences(nearest):
            return f"{of} {'; '.join(different)}"
        if self.speeds():
            return f"{of} {_listed(self.speeds())}, and the job asks for other sizes"
        sizes = sorted({each.batch_size for each in self._measurements if not self._differences(each)})
        return f"{of} batch size {', '.join(map(str, sizes))}, and the job has {self.job.config.batch_size}"

    def _differences(self, measurement: Measurement) -> list[str]:
        """What a measurement has otherwise than the job, but for batch size, shape and steps."""
        was, now = asdict(measurement.conditions), asdict(Conditions.of(self.job))
        if now["revision"] == was["revision"] and len(was["revision"]) == SHA256_DIGITS:
            now["model"] = was["model"]  # a directory is what it holds, wherever it lies
        if self.job.model.pipeline_class == NOT_LOOKED_AT:
            now |= {name: was[name] for name in ("revision", "scheduler")}
        return [
            f"{name} {short_repr(was[name])}, and the job has {short_repr(now[name])}"
            for name in now
            if was[name] != now[name]
        ]


@dataclass(frozen=True)
class Estimate:
    """The time that a plan needs of cards."""

    card_s: float
    """Seconds of one card for all that was measured."""
    speeds: Mapping[Bucket, Speed]
    """By which this was found."""
    unknown: Mapping[Bucket, PlanSummary]
    """What nothing is known of."""

    def text(self, cards: int | None, images: str = "") -> str:
        """The estimate in words.

        Args:
            cards: how many cards there will be; None if nobody knows.
            images: what is to be made, such as ` for 20 images`.
        """
        if cards is None:
            when = f"about {self.card_s / 3600:.3g} card-hours{images}"
        else:
            when = f"about {duration(self.card_s / cards)}{images} on {counted(cards, 'card')}"
        return f"{when} ({self._basis()}){self._not_counted()}"

    def _basis(self) -> str:
        rates: dict[str, list[float]] = {}
        for speed in self.speeds.values():
            rates.setdefault(speed.source, []).append(speed.images_per_s)
        parts = [f"{source}: {_span(each)} images/s a card" for source, each in sorted(rates.items())]
        scaled = {(speed.scaled_from, bucket.steps) for bucket, speed in self.speeds.items() if speed.scaled_from}
        parts += [f"scaled from {was} steps to {now}, in proportion" for was, now in sorted(scaled)[:KINDS_SHOWN]]
        if all(speed.steady for speed in self.speeds.values()):
            parts.append("loading and warm-up left out")
        else:
            parts.append("of first batches, which compile: it will be less")
        return "; ".join(parts)

    def _not_counted(self) -> str:
        if not self.unknown:
            return ""
        images = sum(plan.images for plan in self.unknown.values())
        listed = _listed(bucket.batch_kind for bucket in self.unknown)
        return f"; not counted, as nothing has measured it: {counted(images, 'image')} of {listed}"


def estimate(plan: Mapping[Bucket, PlanSummary], batch_size: int, sources: Sequence[Speeds]) -> Estimate | None:
    """Estimates the time of a plan; None if nothing of it has been measured.

    Args:
        plan: what is to be made.
        batch_size: images of a batch.
        sources: speeds of one card, those that count most first. A speed of other steps counts where no source has one
            of these steps.
    """
    seconds, speeds, unknown = 0.0, {}, {}
    for bucket, part in plan.items():
        speed = _speed(bucket.batch_kind, sources)
        if speed is None:
            unknown[bucket] = part
        else:
            speeds[bucket] = speed
            seconds += (part.batches * batch_size if speed.fills_up else part.images) / speed.images_per_s
    return Estimate(seconds, speeds, unknown) if speeds else None


def _speed(kind: BatchKind, sources: Sequence[Speeds]) -> Speed | None:
    for speeds in sources:
        if kind in speeds:
            return speeds[kind]
    for speeds in sources:
        alike = [other for other in speeds if other._replace(steps=kind.steps) == kind]
        if alike:
            nearest = min(alike, key=lambda other: abs(other.steps - kind.steps))
            return speeds[nearest].scaled(nearest.steps, kind.steps)
    return None


def _listed(kinds: Iterable[BatchKind]) -> str:
    texts = list(dict.fromkeys(f"{kind}, guidance {'on' if kind.guided else 'off'}" for kind in kinds))
    more = [f"{len(texts) - KINDS_SHOWN} more"] if len(texts) > KINDS_SHOWN else []
    return " and ".join([*texts[:KINDS_SHOWN], *more])


def _span(rates: Sequence[float]) -> str:
    lowest, highest = (f"{rate:.1f}" if rate >= 1 else f"{rate:.2g}" for rate in (min(rates), max(rates)))
    return lowest if lowest == highest else f"{lowest} to {highest}"
