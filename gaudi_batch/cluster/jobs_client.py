"""A job sent to a cluster through the Ray Jobs API, its log followed here, its exit code brought back.

What travels is a job file of the fields that were set, in a working directory of its own, and nothing else. Credentials
do not: whoever may look at the cluster's jobs would see them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import re
import secrets
import shlex
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from gaudi_batch.cluster.tokens import what_token_lacks, where_token_is
from gaudi_batch.config.schema import JobConfig
from gaudi_batch.errors import InputError, RunStopped
from gaudi_batch.redaction import has_secret, redact, redacted_options
from gaudi_batch.reporting.console import OutputLost, look_for_reader, say
from gaudi_batch.reporting.stopping import SUBMISSION_VARIABLE, Submitted
from gaudi_batch.storage.retry import in_time
from gaudi_batch.storage.scratch import scratch_directory
from gaudi_batch.text import one_line

log = logging.getLogger("gaudi_batch")

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
JOB_FILE = "job.yaml"
START_FILE = "start.py"
STOP_MARGIN_SECONDS = 15
"""What a driver may take beyond its grace before Ray kills it; Ray's own patience is 3 s."""
LOOK_SECONDS = 1.0
SUBMIT_SECONDS = 60.0
PATIENCE_SECONDS = 300.0
"""How long a cluster that does not answer is asked again."""
ANSWER_SECONDS = 60.0
"""How long one answer may take, and a log be silent before its job is asked after."""
UPLOAD_SECONDS = 600.0
JOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
"""What goes into addresses and file names as it is."""
STOPPED_EXIT_CODE = 130


@dataclass(frozen=True)
class Submission:
    """What is asked of a cluster.

    Args:
        config: the job; all its paths are as the nodes see them.
        flags: of `gaudi-batch run` beside the job.
        grace: seconds that the driver may take to commit what it has begun once it is told to stop.
        job_id: what to call it; None chooses.
        ship_code: whether the nodes are to use this installation's gaudi_batch and not their own.
    """

    config: JobConfig
    flags: Sequence[str]
    grace: float
    job_id: str | None = None
    ship_code: bool = False

    def __post_init__(self) -> None:
        if self.job_id is not None and not JOB_ID.fullmatch(self.job_id):
            raise InputError(f"--job-id {self.job_id!r}: letters, digits, '.', '_' and '-' make an id")

    @property
    def entrypoint(self) -> str:
        """The command that the cluster runs."""
        return shlex.join(["python3", START_FILE, "run", JOB_FILE, "--grace", f"{self.grace:g}", *self.flags])

    @property
    def job_file(self) -> str:
        """The job as YAML."""
        return yaml.safe_dump(self.config.model_dump(mode="json", exclude_unset=True), sort_keys=False)


def refuse_what_stays_here(config: JobConfig) -> None:
    """Refuses a job that means something on this machine alone, or has a secret that the cluster would write down.

    Raises:
        InputError: a path is relative, or there is a secret in it.
    """
    named = {"prompts": config.prompts, "output": config.output, "model": config.model}
    if isinstance(config.gaudi.config, str):
        named["gaudi.config"] = config.gaudi.config
    for name, value in named.items():
        if value is None:
            continue
        relative = "://" not in value and not Path(value).is_absolute()
        # The others may be names on a hub.
        if relative and (name in ("prompts", "output") or value.startswith((".", "~")) or Path(value).exists()):
            raise InputError(
                f"{name}: {value!r} is a path of this machine; a job on a cluster needs a URL, or an absolute path on a"
                " file system that all nodes share"
            )
        if has_secret(value):
            raise InputError(f"{name}: {redact(value)!r} has a secret in it, which the cluster's list of jobs {TELLS}")
    for name in ("storage_options", "prompts_storage_options"):
        options: Mapping[str, Any] = getattr(config, name) or {}
        if redacted_options(options) != options:
            raise InputError(f"{name}: holds a secret, which the cluster's list of jobs {TELLS}")


TELLS = (
    "would tell; give the nodes their credentials by their environment (AWS_ACCESS_KEY_ID,"
    " GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_CONNECTION_STRING) or by their role"
)


class Cluster:
    """A cluster's Jobs API.

    Args:
        address: of its dashboard, as http://head:8265; None takes RAY_API_SERVER_ADDRESS, else this machine's.

    Raises:
        InputError: it does not answer, or refuses this user.
    """

    def __init__(self, address: str | None) -> None:
        if where_token_is():
            # As `ray.init` does; the client of the Jobs API leaves the token where it is.
            os.environ.setdefault("RAY_AUTH_MODE", "token")
        from ray.job_submission import JobSubmissionClient

        for handler in logging.getLogger("ray").handlers:
            handler.setLevel(logging.ERROR)  # some of its loggers have a level of their own
        self.address = address or os.environ.get(ADDRESS_VARIABLE) or DEFAULT_ADDRESS
        if not self.address.startswith(("http://", "https://")):
            raise InputError(f"--address {self.address!r}: jobs are submitted to a dashboard, as in {DEFAULT_ADDRESS}")
        if "[" not in self.address and urlsplit(self.address).netloc.rpartition("@")[2].count(":") > 1:
            raise InputError(
                f"--address {redact(self.address)!r}: an address of IPv6 is written in brackets, as in http://[::1]:8265"
            )
        try:
            self._client = in_time(lambda: JobSubmissionClient(self.address), ANSWER_SECONDS)
        except Exception as error:
            said = _reason(error)
            if "authentication token" in said:
                said = f"{said.partition('. ')[0][:120]}; {what_token_lacks()}"
            raise InputError(f"no cluster takes jobs at {redact(self.address)!r}: {said}") from None

    def submit(self, submission: Submission) -> str:
        """Sends a job; returns its id. Raises InputError."""
        with scratch_directory("pack the job") as directory:
            Path(directory, JOB_FILE).write_text(submission.job_file, encoding="utf-8")
            shutil.copy(Path(__file__).parent.parent / START_FILE, directory)
            environment: dict[str, Any] = {
                "working_dir": directory,
                "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(int(submission.grace) + STOP_MARGIN_SECONDS)},
            }
            if submission.ship_code:
                environment["py_modules"] = [str(Path(__file__).resolve().parent.parent)]
            job = submission.job_id or f"gaudi-batch-{secrets.token_hex(4)}"
            config = submission.config
            submitted = Submitted(secrets.token_hex(8), config.output, config.storage_options, submission.grace)
            environment["env_vars"][SUBMISSION_VARIABLE] = submitted.submission
            self._send(job, submission.entrypoint, environment, submitted.metadata())
        return job

    def _send(self, job: str, entrypoint: str, environment: dict[str, Any], mark: dict[str, str]) -> None:
        sent = {"entrypoint": entrypoint, "runtime_env": environment, "submission_id": job, "metadata": mark}
        until = time.monotonic() + SUBMIT_SECONDS
        while True:
            try:
                in_time(lambda: self._client.submit_job(**sent), UPLOAD_SECONDS)
                return
            except Exception as error:
                if "already exists" in str(error):
                    if self._is_ours(job, mark, until):
                        return
                    raise InputError(f"{redact(self.address)!r} has a job {job!r} already; choose another id") from None
                # An answer may be lost, and a cluster that has just been started has no agent yet.
                if not (isinstance(error, OSError) or "No available agent" in str(error)) or time.monotonic() > until:
                    raise InputError(f"{redact(self.address)!r} does not take the job: {_reason(error)}") from None
                time.sleep(LOOK_SECONDS)

    def _is_ours(self, job: str, mark: Mapping[str, str], until: float) -> bool:
        """Whether a job that is there is the one that was sent, and the answer to that was lost."""
        while True:
            try:
                return bool(self._info(job).metadata == mark)
            except Exception as error:
                if time.monotonic() > until:
                    raise RunStopped(
                        f"{redact(self.address)!r} has a job {job!r} and does not say which: {_reason(error)};"
                        f" gaudi-batch follow {job} shows it"
                    ) from None
            time.sleep(LOOK_SECONDS)

    def _info(self, job: str) -> Any:
        return in_time(lambda: self._client.get_job_info(job), ANSWER_SECONDS)

    def follow(self, job: str) -> int:
        """Prints a job's log as it grows, until the job ends; returns its exit code.

        Raises:
            InputError: there is no such job.
            RunStopped: the cluster has not answered for too long, or the job never began.
            OutputLost: the log can't be printed here any more; the job goes on.
        """
        log_of_job = _Log(self._client, job)

        def print_on() -> None:
            try:
                log_of_job.print_on()
            except OutputLost:
                raise
            except Exception:
                self._info(job)  # says it if there is no such job, which the log does not
                raise

        return self._exit_code(job, self._wait(job, print_on))

    def stop(self, job: str, grace: float | None = None) -> str:
        """Tells a job to stop, says what will happen, and waits until it has ended; returns how it ended.

        Args:
            job: its id.
            grace: seconds in which what has begun is committed; None for those that it was submitted with.

        Raises:
            InputError: there is no such job, or it can't be told.
            RunStopped: the cluster has not answered for too long since.
        """
        try:
            info = self._info(job)
        except Exception as error:
            self._refuse_unknown(job, error)
            raise InputError(f"job {job!r} can't be stopped: {_reason(error)}") from None
        submitted = Submitted.read(info.metadata)
        if info.status.is_terminal():
            return _ended(info)
        if submitted is not None:
            log.info("job %s: %s", job, submitted.outlook(submitted.grace if grace is None else grace))
        if grace is not None:
            if submitted is None:
                raise InputError(f"job {job!r} was not submitted by this version; stop it without --grace")
            submitted.ask_to_stop(grace)
            if ended := self._wait(job, seconds=grace + STOP_MARGIN_SECONDS):
                return _ended(ended)
        try:
            in_time(lambda: self._client.stop_job(job), ANSWER_SECONDS)
        except Exception as error:
            self._refuse_unknown(job, error)
            raise InputError(f"job {job!r} can't be stopped: {_reason(error)}") from None
        return _ended(self._wait(job))

    def _wait(self, job: str, meanwhile: Callable[[], None] = lambda: None, seconds: float = math.inf) -> Any:
        """What the cluster says of a job once it has ended; None if it has not after so many seconds."""
        heard, silent = time.monotonic(), False
        until = heard + seconds
        while time.monotonic() < until:
            try:
                meanwhile()
                info = self._info(job)
            except OutputLost:
                raise
            except Exception as error:
                self._refuse_unknown(job, error)
                waited = time.monotonic() - heard
                if waited > PATIENCE_SECONDS:
                    raise RunStopped(
                        f"{redact(self.address)!r} has not answered for {waited:.0f} s; job {job} may go on:"
                        f" {_reason(error)}"
                    ) from None
                if not silent:
                    log.warning(
                        "%s does not answer, and is asked again for up to %.0f s: %s",
                        *(redact(self.address), PATIENCE_SECONDS, _reason(error)),
                    )
                silent = True
            else:
                if silent:
                    log.warning("%s answers again", redact(self.address))
                heard, silent = time.monotonic(), False
                if info.status.is_terminal():
                    return info
            time.sleep(LOOK_SECONDS)
        return None

    def _refuse_unknown(self, job: str, error: Exception) -> None:
        if "does not exist" in str(error):
            address = redact(self.address)
            raise InputError(
                f"{address!r} has no job {job!r}; `ray job list --address {address}` lists those that it has"
            ) from None

    def _exit_code(self, job: str, info: Any) -> int:
        if info.driver_exit_code is not None:
            return int(info.driver_exit_code)
        if str(info.status) == "STOPPED":
            return STOPPED_EXIT_CODE
        raise RunStopped(f"job {job} has failed before its driver could say why: {one_line(info.message)}")


def _ended(info: Any) -> str:
    """How a job has ended. One that was asked to stop by its output ends by itself, which Ray calls failed."""
    return "STOPPED" if info.driver_exit_code == STOPPED_EXIT_CODE else str(info.status)


class _Log:
    """A job's log, printed here as far as it has come.

    Args:
        client: of the Jobs API.
        job: the job's id.
    """

    def __init__(self, client: Any, job: str) -> None:
        self._client = client
        self._job = job
        self._printed = 0

    def print_on(self) -> None:
        """Prints what is new, until the log ends or is silent for a while."""
        asyncio.run(self._print_on())

    async def _print_on(self) -> None:
        seen = 0  # the whole log comes each time
        pieces = self._client.tail_job_logs(self._job)
        next_piece = asyncio.ensure_future(anext(pieces))
        until = time.monotonic() + ANSWER_SECONDS
        with contextlib.suppress(StopAsyncIteration):
            while time.monotonic() < until:
                look_for_reader()
                if not (await asyncio.wait({next_piece}, timeout=LOOK_SECONDS))[0]:
                    continue
                piece = next_piece.result()
                say(piece[max(0, self._printed - seen) :], end="")
                seen += len(piece)
                self._printed = max(self._printed, seen)
                next_piece = asyncio.ensure_future(anext(pieces))
                until = time.monotonic() + ANSWER_SECONDS
        next_piece.cancel()


def _reason(error: Exception) -> str:
    said = str(error).rstrip(". \n")
    if "Traceback" in said:
        said = said.splitlines()[-1]
    return one_line(redact(said), 1000)
