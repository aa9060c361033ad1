"""What `doctor` asks nodes about, from its command line: a job, or a device alone."""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import typing
from pathlib import Path
from typing import Any

from gaudi_batch.cli.flags import job_from
from gaudi_batch.config.schema import JobConfig
from gaudi_batch.config.sections import GaudiSettings
from gaudi_batch.doctor.node import Question
from gaudi_batch.errors import InputError

WITHOUT_JOB = {"field:device", "field:gaudi.mode"}
"""The fields that mean something without a job."""
DEVICES = typing.get_args(typing.get_type_hints(JobConfig)["device"])
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
    if device not in DEVICES:
        raise InputError(f"--device {device!r}: must be one of {', '.join(DEVICES)}")
    if device == "auto" and parsed.address in (None, "", "local"):
        device = "hpu" if has_cards() else "cpu"
    mode = job.gaudi.mode if job else flags.get("field:gaudi.mode", MODES[0])
    if mode not in MODES:
        raise InputError(f"--gaudi.mode {mode!r}: must be one of {', '.join(MODES)}")
    return Question(device, mode, _from_here(job) if job else None)


def _from_here(job: JobConfig) -> JobConfig:
    """The job with its paths as they are from this directory: nodes have another one."""

    def place(path: str) -> str:
        return path if "://" in path or path.startswith("~") else str(Path(path).absolute())

    def place_if_there(path: str) -> str:  # else it names what is on a hub
        return place(path) if Path(path).expanduser().exists() else path

    changes: dict[str, Any] = {"prompts": place(job.prompts), "output": place(job.output)}
    changes["lora"] = [lora.model_copy(update={"path": place_if_there(lora.path)}) for lora in job.lora]
    if job.model is not None:
        changes["model"] = place_if_there(job.model)
    return job.model_copy(update=changes)


def has_cards() -> bool:
    """Whether this node has something of Intel's stack."""
    return shutil.which("hl-smi") is not None or importlib.util.find_spec("habana_frameworks") is not None
