"""What `doctor` asks nodes about, from its command line: a job, or a device alone."""

from __future__ import annotations

import argparse
import importlib.util
import shutil

from gaudi_batch.cli.flags import job_from
from gaudi_batch.doctor.node import Question


def question(parsed: argparse.Namespace) -> Question:
    """The question. Without a job, storage and model are not looked at.

    Raises:
        InputError: the job is against the rules.
    """
    flags = vars(parsed)
    job = job_from(parsed) if parsed.job or "field:prompts" in flags else None
    device = job.device if job else flags.get("field:device", "auto")
    if device == "auto":
        device = "hpu" if _has_cards() or parsed.address else "cpu"
    mode = job.gaudi.mode if job else flags.get("field:gaudi.mode", "lazy")
    return Question(device, mode, job)


def _has_cards() -> bool:
    """Whether this node has something of Intel's stack."""
    return shutil.which("hl-smi") is not None or importlib.util.find_spec("habana_frameworks") is not None
