"""What `tune` has measured: a JSON record beside the job file, which `check` reads.

It is no part of the job file, which holds what a person wants and is sent to clusters; figures in it would be fields of
a job that decide nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from gaudi_batch.bench.rate import Rate
from gaudi_batch.errors import InputError
from gaudi_batch.job import Job
from gaudi_batch.plan import BatchKind

SUFFIX = ".tune.json"
MAX_MEASUREMENTS = 1000
"""Of a record; beyond it the oldest are dropped."""
MAX_RECORD = 1 << 22
"""Bytes of a record; a larger file is something else."""


@dataclass(frozen=True)
class Conditions:
    """What decides how long a batch takes beside its size, its shape and its steps."""

    model: str
    revision: str
    """The commit of a hub model, or the SHA-256 of a directory's files."""
    scheduler: str | None
    dtype: str
    device: str
    """The kind of device, as in a job."""
    settings: dict[str, Any]
    """Settings of the device that count."""

    @classmethod
    def of(cls, job: Job) -> Conditions:
        """Those of a job."""
        config, model = job.config, job.model
        settings: dict[str, Any] = {"threads": job.threads}
        if config.device == "hpu":
            settings = config.gaudi.shaping()
        if config.device == "simulated":
            settings = config.simulated.model_dump(mode="json", include={"batch_seconds", "seconds_by_size"})
        return cls(model.name, model.revision, model.scheduler, job.dtype, config.device, settings)


@dataclass(frozen=True)
class Measurement:
    """One batch size, measured."""

    time: str
    """When, ISO 8601, UTC."""
    conditions: Conditions
    device_name: str
    """The device, as the card names it."""
    width: int
    height: int
    steps: int
    guided: bool
    batch_size: int
    calls: int
    """Timed calls."""
    latency_s: float
    """Seconds of a call, the median."""
    images_per_s: float
    memory_peak_bytes: int | None
    """Memory of the device in use at most; None where the device does not tell."""
    memory_bytes: int | None
    """Memory that the device has."""

    @classmethod
    def of(cls, job: Job, device_name: str, time: str, rate: Rate) -> Measurement:
        """One of a job's model and shape."""
        kind, memory = job.rules.bucket.batch_kind, rate.memory
        return cls(
            time=time,
            conditions=Conditions.of(job),
            device_name=device_name,
            **kind._asdict(),
            batch_size=rate.batch_size,
            calls=len(rate.seconds),
            latency_s=rate.latency,
            images_per_s=rate.images_per_s,
            memory_peak_bytes=memory and memory.peak,
            memory_bytes=memory and memory.total,
        )

    @property
    def kind(self) -> BatchKind:
        """Of its batches."""
        return BatchKind(self.width, self.height, self.steps, self.guided)

    @property
    def key(self) -> tuple[Any, ...]:
        """A later measurement with the same key replaces this one."""
        settings = json.dumps(asdict(self.conditions), sort_keys=True)
        return (settings, self.device_name, self.kind, self.batch_size)


_MEASUREMENTS = TypeAdapter(list[Measurement])


def record_path(job_file: Path) -> Path:
    """Where the record of a job file is: `job.tune.json` beside `job.yaml`."""
    return job_file.with_name(f"{job_file.stem}{SUFFIX}")


def read_record(path: Path) -> list[Measurement]:
    """What a record holds; nothing if there is none.

    Raises:
        InputError: the file can't be read, or is no record.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_RECORD + 1)
        if len(data) > MAX_RECORD:
            raise ValueError("too large")
        measurements = _MEASUREMENTS.validate_python(json.loads(data)["measurements"])
        if not all(each.latency_s > 0 and each.images_per_s > 0 for each in measurements):
            raise ValueError("a time is not positive")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"the record of tune {str(path)!r} can't be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, RecursionError, ValidationError):
        raise InputError(
            f"{str(path)!r} is no record of tune, or a damaged one; remove it, or give the job file another name"
        ) from None
    return measurements


def merged(before: Sequence[Measurement], now: Sequence[Measurement]) -> list[Measurement]:
    """The measurements of a record with new ones, in order of time."""
    by_key = {each.key: each for each in before}
    for each in now:
        by_key.pop(each.key, None)
        by_key[each.key] = each
    return list(by_key.values())[-MAX_MEASUREMENTS:]


def encode_record(measurements: Sequence[Measurement]) -> bytes:
    """The bytes of a record."""
    return (json.dumps({"measurements": [asdict(each) for each in measurements]}, indent=1) + "\n").encode()
