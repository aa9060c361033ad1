"""A client of a cluster's Jobs API: submits a job, follows its log, returns its exit code."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gaudi_batch.cluster.submission import JOB_FILE, START_FILE, SUBMISSION_VARIABLE, Submission, Submitted
from gaudi_batch.cluster.tokens import what_token_lacks, where_token_is
from gaudi_batch.errors import GaudiBatchError, InputError, RunStopped
from gaudi_batch.redaction import redact
from gaudi_batch.storage.retry import run_with_timeout
from gaudi_batch.storage.scratch import scratch_directory
from gaudi_batch.text import one_line

log = logging.getLogger(__name__)

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
STOP_MARGIN_S = 15
"""Seconds that a driver may take beyond its grace before Ray kills it; Ray's own patience is 3 s."""
JOB_POLL_INTERVAL_S = 1.0
"""Seconds between two questions for a job's state."""
SUBMIT_TIMEOUT_S = 60.0
"""Seconds for which a cluster that does not take a job is asked again."""
SILENCE_TIMEOUT_S = 300.0
"""Seconds for which a cluster that does not answer is asked again."""
ANSWER_TIMEOUT_S = 60.0
"""Seconds that one answer may take, and that a log may be silent before the job's state is asked for."""
UPLOAD_TIMEOUT_S = 600.0
"""Seconds that sending a job with its code may take."""
STOPPED_EXIT_CODE = 130
RAY_LOGGERS = ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")
"""Those of the client of the Jobs API, which log at a level of their own, whatever that of `ray` is."""


class JobsClient:
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

        for name in RAY_LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)
        self.address = address or os.environ.get(ADDRESS_VARIABLE) or DEFAULT_ADDRESS
        if not self.address.startswith(("http://", "https://")):
            raise InputError(f"--address {self.address!r}: jobs are submitted to a dashboard, as in {DEFAULT_ADDRESS}")
        if "[" not in self.address and urlsplit(self.address).netloc.rpartition("@")[2].count(":") > 1:
            raise InputError(
                f"--address {redact(self.address)!r}: an address of IPv6 is written in brackets, as in http://[::1]:8265"
            )
        try:
            self._client = run_with_timeout(lambda: JobSubmissionClient(self.address), ANSWER_TIMEOUT_S)
        except Exception as error:
            reason = _reason(error)
            if "authentication token" in reason:
                reason = f"{reason.partition('. ')[0][:120]}; {what_token_lacks()}"
            raise InputError(f"no cluster takes jobs at {redact(self.address)!r}: {reason}") from None

    def submit(self, submission: Submission) -> str:
        """Sends a job; returns its id. Raises InputError."""
        with scratch_directory("pack the job") as directory:
            Path(directory, JOB_FILE).write_text(submission.job_file, encoding="utf-8")
            shutil.copy(Path(__file__).parent.parent / START_FILE, directory)
            environment: dict[str, Any] = {
                "working_dir": directory,
                "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(int(submission.grace) + STOP_MARGIN_S)},
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
        until = time.monotonic() + SUBMIT_TIMEOUT_S
        while True:
            try:
                run_with_timeout(lambda: self._client.submit_job(**sent), UPLOAD_TIMEOUT_S)
                return
            except Exception as error:
                if "already exists" in str(error):
                    if self._is_ours(job, mark, until):
                        return
                    raise InputError(f"{redact(self.address)!r} has a job {job!r} already; choose another id") from None
                # An answer may be lost, and a cluster that has just been started has no agent yet.
                if not (isinstance(error, OSError) or "No available agent" in str(error)) or time.monotonic() > until:
                    raise InputError(f"{redact(self.address)!r} does not take the job: {_reason(error)}") from None
                time.sleep(JOB_POLL_INTERVAL_S)

    def _is_ours(self, job: str, mark: Mapping[str, str], until: float) -> bool:
        """Whether an existing job is the one that was sent, and only the answer to that was lost."""
        while True:
            try:
                return bool(self.info(job).metadata == mark)
            except Exception as error:
                if time.monotonic() > until:
                    raise RunStopped(
                        f"{redact(self.address)!r} has a job {job!r} and does not say which: {_reason(error)};"
                        f" gaudi-batch follow {job} shows it"
                    ) from None
            time.sleep(JOB_POLL_INTERVAL_S)

    def info(self, job: str) -> Any:
        """What the cluster says of a job. Raises what the client of the Jobs API raises."""
        return run_with_timeout(lambda: self._client.get_job_info(job), ANSWER_TIMEOUT_S)

    def follow(self, job: str, show: Callable[[str], None], check_reader: Callable[[], None]) -> int:
        """Shows a job's log as it grows, until the job ends; returns its exit code.

        Args:
            job: its id.
            show: called with each new piece of the log.
            check_reader: called again and again; what it or `show` raises of this package's errors ends this and not
                the job.

        Raises:
            InputError: there is no such job.
            RunStopped: the cluster has not answered for too long, or the job never began.
        """
        log_of_job = _Log(self._client, job, show, check_reader)

        def show_more() -> None:
            try:
                log_of_job.show_more()
            except GaudiBatchError:
                raise
            except Exception:
                self.info(job)  # says it if there is no such job, which the log does not
                raise

        return self._exit_code(job, self.wait(job, show_more))

    def find(self, job: str) -> Any:
        """What the cluster says of a job. Raises InputError."""
        try:
            return self.info(job)
        except Exception as error:
            self._refuse_unknown(job, error)
            raise InputError(f"job {job!r} can't be stopped: {_reason(error)}") from None

    def stop(self, job: str) -> Any:
        """Has the cluster stop a job, and waits until it has ended; returns what the cluster then says of it.

        Raises:
            InputError: there is no such job, or it can't be told.
            RunStopped: the cluster has not answered for too long since.
        """
        try:
            run_with_timeout(lambda: self._client.stop_job(job), ANSWER_TIMEOUT_S)
        except Exception as error:
            self._refuse_unknown(job, error)
            raise InputError(f"job {job!r} can't be stopped: {_reason(error)}") from None
        return self.wait(job)

    def wait(self, job: str, meanwhile: Callable[[], None] = lambda: None, seconds: float = math.inf) -> Any:
        """What the cluster says of a job once it has ended; None if it has not after so many seconds.

        Args:
            job: its id.
            meanwhile: called again and again.
            seconds: for how long to wait.

        Raises:
            RunStopped: the cluster has not answered for too long.
        """
        last_seen, silent = time.monotonic(), False
        until = last_seen + seconds
        while time.monotonic() < until:
            try:
                meanwhile()
                info = self.info(job)
            except GaudiBatchError:
                raise
            except Exception as error:
                self._refuse_unknown(job, error)
                waited = time.monotonic() - last_seen
                if waited > SILENCE_TIMEOUT_S:
                    raise RunStopped(
                        f"{redact(self.address)!r} has not answered for {waited:.0f} s; job {job} may go on:"
                        f" {_reason(error)}"
                    ) from None
                if not silent:
                    log.warning(
                        "%s does not answer, and is asked again for up to %.0f s: %s",
                        *(redact(self.address), SILENCE_TIMEOUT_S, _reason(error)),
                    )
                silent = True
            else:
                if silent:
                    log.warning("%s answers again", redact(self.address))
                last_seen, silent = time.monotonic(), False
                if info.status.is_terminal():
                    return info
            time.sleep(JOB_POLL_INTERVAL_S)
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


class _Log:
    """A job's log, shown as far as it has come.

    Args:
        client: of the Jobs API.
        job: the job's id.
        show: takes each new piece.
        check_reader: called again and again meanwhile.
    """

    def __init__(self, client: Any, job: str, show: Callable[[str], None], check_reader: Callable[[], None]) -> None:
        self._client = client
        self._job = job
        self._show = show
        self._check_reader = check_reader
        self._chars_shown = 0

    def show_more(self) -> None:
        """Shows what is new, until the log ends or is silent for a while."""
        asyncio.run(self._show_more())

    async def _show_more(self) -> None:
        seen = 0  # the whole log comes each time
        pieces = self._client.tail_job_logs(self._job)
        next_piece = asyncio.ensure_future(anext(pieces))
        until = time.monotonic() + ANSWER_TIMEOUT_S
        with contextlib.suppress(StopAsyncIteration):
            while time.monotonic() < until:
                self._check_reader()
                if not (await asyncio.wait({next_piece}, timeout=JOB_POLL_INTERVAL_S))[0]:
                    continue
                piece = next_piece.result()
                self._show(piece[max(0, self._chars_shown - seen) :])
                seen += len(piece)
                self._chars_shown = max(self._chars_shown, seen)
                next_piece = asyncio.ensure_future(anext(pieces))
                until = time.monotonic() + ANSWER_TIMEOUT_S
        next_piece.cancel()


def _reason(error: Exception) -> str:
    reason = str(error).rstrip(". \n")
    if "Traceback" in reason:
        reason = reason.splitlines()[-1]
    return one_line(redact(reason), 1000)
