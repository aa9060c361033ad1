"""The commands that measure cards: the job that they measure, and where `tune` puts its result."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from gaudi_batch.bench.job_file import FIELD, JobFile, is_file
from gaudi_batch.bench.tune import Tuned
from gaudi_batch.bench.tune import tune as measure
from gaudi_batch.cli.demo import PROMPTS
from gaudi_batch.cli.flags import job_from
from gaudi_batch.cluster.address import address_of
from gaudi_batch.cluster.devices import with_device
from gaudi_batch.errors import InputError
from gaudi_batch.job import Job, resolve
from gaudi_batch.reporting.console import say
from gaudi_batch.text import quote_if_unprintable

JOB_FILES = (".yaml", ".yml", ".json")
"""How the names of job files end."""


def job_to_measure(parsed: argparse.Namespace, address: str | None) -> Job:
    """The job of the command line, with bundled prompts in place of those that it may have and without an output.

    Args:
        parsed: the command line.
        address: the Ray cluster, or None for this machine.

    Raises:
        InputError: it can't be run as it is.
    """
    places: dict[str, Any] = {"prompts": str(PROMPTS), "output": os.curdir}
    config = job_from(parsed, places)
    unused: dict[str, Any] = {"columns": {}, "carry": None, "limit": None}
    unused |= {"storage_options": {}, "prompts_storage_options": None}
    return resolve(with_device(config.model_copy(update=places | unused), address))


def require_positive(flag: str, value: int) -> None:
    """Raises InputError if a flag's number is below 1."""
    if value < 1:
        raise InputError(f"{flag} is {value}; it must be 1 or more")


def tune(parsed: argparse.Namespace) -> None:
    """Measures batch sizes, prints what was measured, and writes the choice into the job file.

    Raises:
        InputError: the job can't be run as it is, there is no card, or the job file can't be written.
        RunStopped: the card can't make even one image.
    """
    require_positive("--calls", parsed.calls)
    require_positive("--max-batch-size", parsed.max_batch_size)
    _sort_arguments(parsed)
    job_file = None if parsed.job is None else JobFile(parsed.job)
    address = address_of(parsed.address)
    tuned = measure(job_to_measure(parsed, address), address, parsed.calls, parsed.max_batch_size)
    if parsed.json:
        files = {"job_file": job_file and str(job_file.path), "record": job_file and str(job_file.record)}
        text = json.dumps(tuned.describe() | files, indent=1)
    else:
        text = tuned.table()
    try:
        # Before anything is printed: a reader that closes the pipe ends the command.
        written = _write(tuned, job_file)
    except InputError:
        say(text)  # what took minutes
        raise
    say(text if parsed.json else f"{text}\n{written}")


def _sort_arguments(parsed: argparse.Namespace) -> None:
    """Finds out which of MODEL and JOB was given where only one was, and makes the model a field of the job."""
    model = parsed.model
    if model is not None and parsed.job is None and (model.endswith(JOB_FILES) or is_file(model)):
        parsed.model, parsed.job = None, model
    elif model is not None:
        flag = vars(parsed).setdefault("field:model", model)
        if flag != model:
            raise InputError(f"tune {model!r} and --model {flag!r} name two models; name one")


def _write(tuned: Tuned, job_file: JobFile | None) -> str:
    """Writes the choice and the figures; returns what was done, in words."""
    line = f"{FIELD}: {tuned.search.chosen.batch_size}"
    if job_file is None:
        return f"for the job file:\n\n{line}"
    before = job_file.write(tuned.search.chosen.batch_size, tuned.measurements)
    file, record = (quote_if_unprintable(str(path)) for path in (job_file.path, job_file.record))
    if before == tuned.search.chosen.batch_size:
        change = f"{file} has {line} already"
    elif before is None:
        change = f"written: {line} into {file}"
    else:
        change = (
            f"written: {line} into {file}, where it was {before}; a run that began with {before} goes on only with that"
        )
    return f"{change}\nwritten: the figures into {record}, for `gaudi-batch check {file}`"
