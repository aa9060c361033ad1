"""What `doctor` asks nodes about, from its command line: a job, or a device alone."""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import typing

from gaudi_batch.cli.flags import job_from
from gaudi_batch.config.sections import GaudiSettings
from gaudi_batch.doctor.node import Question
from gaudi_batch.errors import InputError

WITHOUT_JOB = {"field:device", "field:gaudi.mode"}
"""The fields that mean something without a job."""
MODES = typing.get_args(typing.get_type_hints(GaudiSettings)["mode"])


def question(parsed: argparse.Namespace) -> Question:
    """The question. Without a job, storage and model are not looked at.

    Raises:
        InputError: the job is against the rules, or fields are named that need one.
    """
    flags = {name: value for name, value in vars(parsed).items() if name.startswith("field:")}
    job = job_from(parsed) if parsed.job or "field:prompts" in flags else None
    if job is None and (others := sorted(flags.keys() - WITHOUT_JOB)):
        names = ", ".join("--" + name.removeprefix("field:").replace("_", "-") for name in others)
        raise InputError(f"{names}: is of a job; name its file, or its --prompts and --output too")
    device = job.device if job else flags.get("field:device", "auto")
    if device == "auto" and not parsed.address:
        device = "hpu" if has_cards() else "cpu"
    mode = job.gaudi.mode if job else flags.get("field:gaudi.mode", MODES[0])
    if mode not in MODES:
        raise InputError(f"--gaudi.mode {mode!r}: must be one of {', '.join(MODES)}")
    return Question(device, mode, job)


def has_cards() -> bool:
    """Whether this node has something of Intel's stack."""
    return shutil.which("hl-smi") is not None or importlib.util.find_spec("habana_frameworks") is not None
