"""The errors that a user may see, each with the exit code that it means.

GaudiBatchError
    InputError
        HubUnreachable
    StorageError
    RunStopped
        LeaseLost (output/lease.py)
        CardFailed (bench/card.py)
        Interrupted
            ForcedInterrupt
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gaudi_batch.redaction import redact


class GaudiBatchError(Exception):
    """Any end of a command that has a sentence for the user; `exit_code` is what the command returns. The sentence has
    no secrets, whoever writes it.

        >>> from gaudi_batch import GaudiBatchError, JobConfig
        >>> try:
        ...     JobConfig(prompts="prompts.parquet", output="out", steps=0)
        ... except GaudiBatchError as error:
        ...     print(error.exit_code)
        2
    """

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(redact(message))


class InputError(GaudiBatchError):
    """The job can't be run as it was given: bad usage, bad input, or an output that belongs to another job.

    >>> from gaudi_batch import InputError, JobConfig
    >>> try:
    ...     JobConfig(prompts="prompts.parquet", output="out", device="simulated", stepz=20)
    ... except InputError as error:
    ...     print(error)
    stepz: is not a field of a job; did you mean steps?
    """

    exit_code = 2


class HubUnreachable(InputError):
    """The model hub can't be reached, and what is asked of it is not in the cache."""


class StorageError(GaudiBatchError):
    """Storage refused, or went on failing for longer than the job's `storage_patience`.

    >>> from gaudi_batch import StorageError
    >>> StorageError("s3://bucket/out: can't write x", refused=True).refused
    True
    """

    def __init__(self, message: str, refused: bool = False) -> None:
        super().__init__(message)
        self.refused = refused
        """Whether another try would be of no use: no permission, no space, no such place."""


class RunStopped(GaudiBatchError):
    """The run ended before every image was made; the same call resumes it.

    >>> from gaudi_batch import JobConfig, RunStopped, run
    >>> broken = {"unloadable_modules": [0, 1, 2, 3, 4, 5, 6, 7]}
    >>> job = JobConfig(prompts="prompts.parquet", output="stopped", device="simulated", simulated=broken)
    >>> try:
    ...     run(job)
    ... except RunStopped as error:
    ...     print(error.exit_code, str(error)[:27])
    1 stopped: no card is left; t
    """

    def __init__(self, message: str, summary: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.summary = summary
        """What summary.json says of the run; None where the run ended before it was written."""


class Interrupted(RunStopped):
    """Ctrl-C or SIGTERM ended the run; what had begun was committed, as far as the grace allowed.

    >>> from gaudi_batch import Interrupted, RunStopped
    >>> issubclass(Interrupted, RunStopped), Interrupted.exit_code
    (True, 130)
    """

    exit_code = 130


class ForcedInterrupt(Interrupted):
    """A second signal ended the run at once, without waiting for what had begun."""
